"Somebody's predictions, without an image: evaluated, frozen, tested on strangers, and counted."
import json

import numpy as np
import pandas as pd
import pytest

from commands import run_command
from mgmt_fast.bundle import FrozenPredictions, freeze_predictions
from mgmt_fast.cli import mgmt_evaluate, mgmt_external
from mgmt_fast.core import MGMTError, rng_for
from mgmt_fast.evaluate import choose_threshold, read_predictions
from mgmt_fast.external import external_predictions, external_table, preregister, read_result
from mgmt_fast.metrics import auc_ci


def table(path, hospital, n=60, signal=1., seed=0, **columns):
    "Predictions of `n` patients, as a CSV"
    r = rng_for(seed, hospital)
    label = r.permutation(np.arange(n)%2)
    prob = 1/(1+np.exp(-(signal*(2*label-1)+r.standard_normal(n))))
    t = pd.DataFrame(dict(patient=[f'{hospital}-{i:03d}' for i in range(n)], label=label, prob=prob)).assign(**columns)
    t.to_csv(path, index=False)
    return path


@pytest.fixture
def frozen(tmp_path):
    return freeze_predictions(read_predictions(table(tmp_path/'validation.csv', 'A')), tmp_path/'frozen', 'a forest')


def test_the_threshold_is_that_of_validation(frozen, tmp_path):
    v,t = (pd.read_csv(table(tmp_path/f'{h}.csv', h)) for h in 'AB')
    res = external_predictions(frozen, tmp_path/'B.csv')
    assert res['threshold']==frozen.threshold==choose_threshold(v.label, v.prob)
    assert res['all']['auc'][0]==pytest.approx(auc_ci(t.label, t.prob).auc, abs=1e-6)
    called = (t.prob>=frozen.threshold)==(t.label==1)
    assert res['all']['accuracy'][0]==pytest.approx(called.mean(), abs=1e-6)
    assert res['model']['arch']=='a forest' and 'cannot show' in res['note'] and 'without images' in res['note']


def test_each_look_is_counted_wherever_the_table_lies(frozen, tmp_path):
    test = table(tmp_path/'B.csv', 'B')
    assert [external_predictions(frozen, test)['pass'] for _ in range(2)]==[1,2]
    (tmp_path/'elsewhere').mkdir()
    assert external_predictions(frozen, table(tmp_path/'elsewhere'/'C.csv', 'B', signal=2.))['pass']==3
    other = freeze_predictions(read_predictions(tmp_path/'validation.csv'), tmp_path/'other', 'a net')
    res = external_predictions(other, test)
    assert (res['pass'], res['record']['bundles'])==(1,2)
    assert external_predictions(other, table(tmp_path/'D.csv', 'D'))['record']['bundles']==1


def test_what_is_refused(frozen, tmp_path):
    with pytest.raises(MGMTError, match='in training and test'): external_predictions(frozen, tmp_path/'validation.csv')
    with pytest.raises(MGMTError, match='another folder'):
        freeze_predictions(read_predictions(tmp_path/'validation.csv'), tmp_path/'frozen')
    again = freeze_predictions(read_predictions(tmp_path/'validation.csv'), tmp_path/'frozen', 'a forest')
    assert again.signature==frozen.signature
    test = table(tmp_path/'B.csv', 'B')
    result = external_predictions(frozen, test)
    name = result['predictions']['file'].replace('.csv', '.json')
    assert read_result(tmp_path/'frozen'/name)==result
    ledger = tmp_path/'frozen'/'ledger.jsonl'
    ledger.write_text(''.join(ledger.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(MGMTError, match='by hand'): external_predictions(frozen, test)
    said = json.loads((tmp_path/'frozen'/'predictions.json').read_text())
    (tmp_path/'frozen'/'predictions.json').write_text(json.dumps(dict(said, threshold=.9)))
    with pytest.raises(MGMTError, match='changed'): FrozenPredictions(tmp_path/'frozen')


def test_the_model_s_file_is_the_one_that_was_frozen(tmp_path):
    weights = tmp_path/'weights.bin'
    weights.write_bytes(b'one')
    f = freeze_predictions(read_predictions(table(tmp_path/'A.csv', 'A')), tmp_path/'frozen', weights)
    assert f.model=='weights.bin'
    test = table(tmp_path/'B.csv', 'B')
    assert 'cannot show' not in external_predictions(f, test, model=weights)['note']
    assert 'cannot show' in external_predictions(f, test)['note']
    weights.write_bytes(b'two')
    with pytest.raises(MGMTError, match='not the file that was frozen'): external_predictions(f, test, model=weights)


def test_a_plan_is_fulfilled_or_deviated_from(frozen, tmp_path):
    preregister(tmp_path/'plan.json', tmp_path/'frozen', 'hospital B', 'AUC above .6', n=60)
    test = table(tmp_path/'B.csv', 'B')
    assert external_predictions(frozen, test, plan=tmp_path/'plan.json')['plan']['deviates']==[]
    assert external_predictions(frozen, test, plan=tmp_path/'plan.json')['plan']['deviates']==['pass 2, not the first',
        'the cohort had been met once before the plan was written'][:1]


def test_patients_without_a_label_or_a_probability_are_left_out(frozen, tmp_path):
    test = table(tmp_path/'B.csv', 'B')
    t = pd.read_csv(test).astype({'label':'Int64'})
    t.loc[0,'label'],t.loc[1,'prob'] = pd.NA,np.nan
    t.to_csv(test, index=False)
    res = external_predictions(frozen, test)
    assert res['all']['n']==58
    assert [o['why'] for o in res['cohort']['left_out']]==['no label', 'no probability']


@pytest.mark.parametrize('columns,said', [(dict(prob='high'), 'not, e.g.'), (dict(prob=7.), 'per cent'),
    (dict(patient='1'), 'more than once'), (dict(probability=.5), 'prob_col')], ids=str)
def test_tables_that_cannot_be_read(tmp_path, columns, said):
    with pytest.raises(MGMTError, match=said): read_predictions(table(tmp_path/'t.csv', 'A', **columns))


def test_the_commands(tmp_path, capsys):
    for h in 'AB': table(tmp_path/f'{h}.csv', h)
    r = run_command('mgmt_evaluate', '--predictions', 'A.csv', '--dest', 'judged', '--model', 'a forest', '--bundle',
        'frozen', cwd=tmp_path)
    assert r.returncode==0, r.stdout+r.stderr
    assert {'roc.png','calibration.png','decision.png'}<={o.name for o in (tmp_path/'judged'/'figures').iterdir()}
    assert 'Research use only' in (tmp_path/'judged'/'report.html').read_text()
    assert mgmt_external(tmp_path/'frozen', predictions=tmp_path/'B.csv')==0
    assert 'first pass' in capsys.readouterr().out
    page = next((tmp_path/'frozen').glob('external-*/report.html')).read_text()
    assert 'external test of a forest' in page and 'first pass' in page
    assert len(external_table(sorted((tmp_path/'frozen').glob('external-*.json'))))==1
    assert mgmt_evaluate()==2 and mgmt_external(tmp_path/'frozen')==2
    assert 'one of the two' in capsys.readouterr().err
