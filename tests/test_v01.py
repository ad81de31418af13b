"What version 0.1 wrote is read where that is safe, else it is said what to do."
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from mgmt_fast.core import MGMTError, get_recipe
from mgmt_fast.evaluate import cross_validate, read_oof
from mgmt_fast.external import external_table, external_test, read_result
from mgmt_fast.learner import load_model, mgmt_learner, predict, recipe_dls
from mgmt_fast.prepare import VolumeStore, prepare
from mgmt_fast.sweep import search, sweep, sweep_table

OLD = Path(__file__).parent/'v01'


@pytest.fixture
def old(tmp_path):
    "A copy, since some of it is written to."
    shutil.copytree(OLD, tmp_path/'v01')
    return tmp_path/'v01'


def test_a_store_is_read_with_its_labels(old):
    store,d = VolumeStore(old/'store'),json.loads((old/'store/store.json').read_text())
    assert store.version=='0.1.0' and store.sequences==('FLAIR','T1wCE')
    assert store.table.label.tolist()==[v['label'] for v in d['patients'].values()]
    assert store.read('00003').shape==(2,4,12,12) and not len(store.verify())


def test_a_store_is_brought_up_to_date(old, tmp_path, capsys):
    "Its pixels are taken as they are, which is said; from then on a replaced scan is noticed."
    store = VolumeStore(old/'store')
    scan = tmp_path/'scan.nii'; scan.write_bytes(b'any file')
    cohort = store.table.assign(FLAIR=str(scan), T1wCE=str(scan), label=1-store.table.label)
    new = prepare(cohort, old/'store', store.sequences, recipe=store.recipe, n_workers=1, progress=False)
    said = capsys.readouterr().out
    assert '44 patients as prepared before' in said
    assert '44 prepared by version 0.1, which did not write down from which files' in said
    assert '44 labels changed' in said and new.table.label.tolist()==cohort.label.tolist()
    assert (new.read('00003')==store.read('00003')).all()
    prepare(cohort, old/'store', store.sequences, recipe=store.recipe, n_workers=1, progress=False)
    assert 'version 0.1' not in capsys.readouterr().out
    other = tmp_path/'other.nii'; other.write_bytes(b'another')
    cohort.loc[0,'FLAIR'] = str(other)
    prepare(cohort, old/'store', store.sequences, recipe=store.recipe, n_workers=1, progress=False)
    assert '1 prepared again, since their scans were replaced (00000)' in capsys.readouterr().out


def test_an_unfinished_store_says_what_to_do(old, tmp_path):
    d = json.loads((old/'store/store.json').read_text())
    (old/'store/store.json').unlink()
    (old/'store/journal.jsonl').write_text(json.dumps(d['key'])+'\n')
    cohort = pd.DataFrame(dict(patient=['00000'], label=[1], FLAIR=['x.nii']))
    with pytest.raises(MGMTError, match='unfinished store of version 0.1.0.*delete it'):
        prepare(cohort, old/'store', 'FLAIR', size=(4,12,12), progress=False)


def test_a_model_predicts_as_it_did(old):
    "Its configuration need not say how depth is convolved: separably."
    js = old/'run/model.json'
    d = json.loads(js.read_text())
    assert d['config'].pop('depth')=='separable'
    js.write_text(json.dumps(d))
    p,then = predict(old/'run', VolumeStore(old/'store'), progress=False),pd.read_csv(old/'predictions.csv',
        dtype=dict(patient=str))
    assert (p.patient==then.patient).all() and (p.prob-then.prob).abs().max()<1e-5
    assert load_model(old/'run').recipe.bs==8


def test_a_bundle_its_ledger_and_results_go_on(old):
    shutil.copy(old/'run/model.safetensors', old/'bundle/model-0.safetensors')
    result = next((old/'external').glob('external-*-1.json'))
    first = read_result(result)
    again = external_test(old/'bundle', VolumeStore(old/'new'), old/'external', progress=False)
    assert (first['pass'],again['pass'])==(1,2), 'the ledger of version 0.1 counts'
    assert abs(again['all']['auc'][0]-first['all']['auc'][0])<1e-6
    assert 'overlap could not be excluded' in again['note'] and again['record']['bundles']==1
    assert external_table([first, again]).bundles.isna().tolist()==[True,False]
    with pytest.raises(MGMTError, match='external test'):
        cross_validate(VolumeStore(old/'new'), old/'cv2', progress=False)


def test_kept_results_are_named_and_not_returned(old, capsys):
    "They do not say of which patients and labels they are."
    r,n = load_model(old/'run').recipe,'made by version 0.1, which did not write down of what'
    r = get_recipe('default', size=r.size, arch=r.arch, anisotropic=r.anisotropic, lr=r.lr, epochs=1)
    sweep(sweep_table([r.arch], ['T1wCE'], [0]), old/'store', old/'sweep', r, n_folds=3, progress=False)
    assert f'1 kept run in {old}/sweep not used, but trained anew: {n}' in capsys.readouterr().out
    cross_validate(VolumeStore(old/'store'), old/'cv', recipe=r, sequences='T1wCE', n_folds=2, inner=2, progress=False)
    assert f'2 kept runs in {old}/cv not used, but trained anew: {n}' in capsys.readouterr().out
    assert len(search(dict(bs=[4,8]), old/'store', old/'search', 1, r, n_folds=3))==1
    assert f'1 trials of an earlier search are not used: {n}' in capsys.readouterr().out
    learn = mgmt_learner(recipe_dls(VolumeStore(old/'store'), r, n_folds=3, sequences='T1wCE'), recipe=r,
        path=old/'run')
    with pytest.raises(MGMTError, match=f'{n}; give another folder, or delete checkpoint'), learn.no_bar():
        learn.fit_recipe(resume=True)


def test_out_of_fold_predictions_are_read(old):
    assert len(read_oof(old/'cv'))==44
