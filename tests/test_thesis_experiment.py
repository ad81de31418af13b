"The thesis' experiment: each recipe goes all the way, and what was stopped goes on."
import json

import numpy as np
import pandas as pd
import pytest

from commands import run_command
from mgmt_fast.baselines import baselines
from mgmt_fast.bundle import cv_models, freeze_bundle, preparation, preparation_differs
from mgmt_fast.callbacks import Checkpoint
from mgmt_fast.card import evaluate_report, model_card
from mgmt_fast.cohort import find_cohort, kaggle_cohort
from mgmt_fast.core import MGMTError, get_recipe
from mgmt_fast.evaluate import cross_validate, results_table
from mgmt_fast.experiment import QUICK, quick_stores, run_thesis, thesis_cells, thesis_external
from mgmt_fast.external import external_test
from mgmt_fast.kaggle import make_tcga_phantom, predict_submission
from mgmt_fast.leakage import leakage_audit
from mgmt_fast.learner import load_model, predict
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import prepare

TINY = dict(size=(8,16,16), arch='timm/test_resnet', anisotropic=2, pretrained=False, epochs=1, lr=3e-3, bs=4)
INSIDE = dict(n_folds=2, inner=2, progress=False)


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    "A phantom to train on and another from elsewhere"
    d = tmp_path_factory.mktemp('scans')
    shape = dict(auc=.9, test=0, slices=12, size=32, sequences=('FLAIR','T1wCE'), progress=False)
    make_phantom(d/'train', n=44, seed=2, **shape)
    make_phantom(d/'new', n=16, seed=7, **shape)
    new = kaggle_cohort(d/'new')
    return kaggle_cohort(d/'train'),new.assign(patient='N'+new.patient).astype({'patient':'string'})


@pytest.mark.parametrize('name', ['published','winner','default'])
def test_a_recipe_goes_all_the_way(scans, tmp_path, name):
    "Cross-validation, report, baselines, card, bundle, external test, prediction and submission"
    r = get_recipe(name, **TINY, sequences=('T1wCE',))
    train,new = scans
    store = prepare(train, tmp_path/'store', 'FLAIR,T1wCE', recipe=r, n_workers=1, progress=False)
    oof = cross_validate(store, tmp_path/'cv', recipe=r, **INSIDE)
    assert len(results_table(oof))==1 and oof.prob.notna().all()
    known = baselines(store, progress=False).baseline.tolist()
    assert {'slice count','header','brain volume'}<=set(known) and ('intensity scale' in known)==(name=='default')
    bundle = freeze_bundle(**cv_models(tmp_path/'cv'), store=store, dest=tmp_path/'bundle')
    result = external_test(bundle, new, tmp_path/'test', progress=False)
    assert result['pass']==1 and result['all']['n']==16 and result['overlap']['compared']==16
    page = evaluate_report(store, tmp_path/'cv', results=result, bundle=bundle)
    card = model_card(store, oof, bundle, result).set_index('item').what
    how = card['7 Data preparation']
    assert ('one box, grid' in how)==(name=='default') and ('without millimetres' in how)==(name!='default')
    assert page.exists() and ('not looked at' in how)==(name!='default')
    scanned = predict(tmp_path/'bundle', new, n_workers=1, progress=False)
    tested = pd.read_csv(tmp_path/'test'/result['predictions']['file'])
    np.testing.assert_allclose(scanned.prob, tested.prob, atol=1e-5)
    sent = predict_submission(new, [tmp_path/'bundle'], tmp_path/'sent', progress=False)
    np.testing.assert_allclose(sent.prob, tested.prob, atol=1e-5)


def test_what_is_not_known_is_not_compared(scans, tmp_path):
    r = get_recipe('published', **TINY)
    store = prepare(scans[1], tmp_path/'store', 'FLAIR', recipe=r, n_workers=1, progress=False)
    a = preparation(store)
    assert a['FLAIR']==dict(skull=None, spacing=None, space='12x32x32 voxels', plane=None)
    assert not len(preparation_differs(a, a))
    other = {'FLAIR':{**a['FLAIR'], 'space':'20x64x64 voxels'}}
    assert preparation_differs(a, other).what.tolist()==['space']


def test_copies_are_found_in_stores_of_slices(scans, tmp_path):
    "Without millimetres a brain of usual size fills the box, so an audit and a test can still compare"
    r,(train,new) = get_recipe('published', **{**TINY, 'size':(12,32,32)}),scans
    twice = pd.concat([new.iloc[1:], train.iloc[:1].assign(patient='N99')], ignore_index=True)
    a,b = (prepare(o, tmp_path/k, 'FLAIR', recipe=r, n_workers=1, progress=False)
        for k,o in dict(a=train.iloc[:20], b=twice).items())
    table = leakage_audit(a, b, small=50, planted=2, n_workers=0, progress=False)
    same = table[table.verdict=='same']
    assert same[['train','test']].values.tolist()==[[train.patient[0],'N99']]


def interrupted_after(monkeypatch, n):
    "Stop as if by Ctrl-C after `n` checkpoints; counts the epochs that are run"
    kept,run = Checkpoint.after_epoch,[]
    def after_epoch(self):
        kept(self)
        run.append(self.epoch)
        if len(run)==n: raise KeyboardInterrupt
    monkeypatch.setattr(Checkpoint, 'after_epoch', after_epoch)
    return run


def test_a_cross_validation_goes_on_within_a_run(scans, tmp_path, monkeypatch):
    r = get_recipe('default', **{**TINY, 'epochs':3}, sequences=('T1wCE',))
    store = prepare(scans[0], tmp_path/'store', 'T1wCE', recipe=r, n_workers=1, progress=False)
    whole = cross_validate(store, tmp_path/'whole', recipe=r, **INSIDE)
    run = interrupted_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt): cross_validate(store, tmp_path/'parts', recipe=r, **INSIDE)
    assert run==[0,1,2,0,1] and len(list((tmp_path/'parts').rglob('checkpoint.safetensors')))==1
    again = cross_validate(store, tmp_path/'parts', recipe=r, **INSIDE)
    assert run==[0,1,2,0,1,2] and not list((tmp_path/'parts').rglob('checkpoint.safetensors'))
    pd.testing.assert_frame_equal(again, whole)


SMALL = dict(n=40, n_test=12, size=(8,16,16), epochs=2, sequences=('FLAIR',))
EXPERIMENT = dict(archs=['timm/test_resnet'], real=False, progress=False, **QUICK)


@pytest.fixture(scope='module', params=['published','winner','default'])
def stores(request, tmp_path_factory):
    d = tmp_path_factory.mktemp(request.param)
    return d,quick_stores(d/'store', d/'tcga', request.param, **SMALL)


def test_an_experiment_goes_on_where_it_stopped(stores, tmp_path, monkeypatch):
    d,recipe = stores
    recipe = get_recipe(recipe, sequences=('FLAIR',))
    def go(): return run_thesis(d/'store', d/'tcga', tmp_path/'out', recipe=recipe, **EXPERIMENT)
    run = interrupted_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt): go()
    page = go()
    assert len(run)==2*3, 'of the split and of two folds, two epochs each, none of them twice'
    runs = pd.read_csv(page.parent/'runs.csv')
    assert runs.part.value_counts().to_dict()=={'split':1, 'folds':2, 'external, its split':1, 'external, folds':1}
    assert runs.error.isna().all()
    text = page.read_text()
    assert 'Table 4' in text and ('augments nothing' in text or text.count('<img')>=7)
    stamps = {p: p.stat().st_mtime_ns for p in page.parent.rglob('external-*.json')}
    go()
    assert len(run)==6 and {p: p.stat().st_mtime_ns for p in page.parent.rglob('external-*.json')}==stamps
    with pytest.raises(MGMTError, match='another experiment: it differs in .*lr'):
        run_thesis(d/'store', d/'tcga', tmp_path/'out', recipe=get_recipe(recipe, lr=.5), **EXPERIMENT)


def test_what_fails_is_a_row(scans, tmp_path):
    "An architecture that there is not; a test cohort of another grid"
    r = get_recipe('default', **TINY)
    store = prepare(scans[0], tmp_path/'store', 'FLAIR', recipe=r, n_workers=1, progress=False)
    make_tcga_phantom(tmp_path/'scans', n=12, slices=12, size=40)
    far = find_cohort(tmp_path/'scans', labels=tmp_path/'scans/labels.csv')
    tcga = prepare(far, tmp_path/'tcga', 'FLAIR', recipe=r, n_workers=1, progress=False)
    how = {**EXPERIMENT, 'archs':['no such','timm/test_resnet'], 'audit':dict(small=50, planted=2, n_workers=0)}
    page = run_thesis(store, tcga, tmp_path/'out', recipe=r, **how)
    runs = pd.read_csv(page.parent/'runs.csv').set_index(['part','arch']).error
    assert 'no such' in runs['split','no such'] and 'no such' in runs['folds','no such']
    assert 'it was not trained' in runs['external, its split','no such']
    assert 'space' in runs['external, folds','timm/test_resnet'] and pd.isna(runs['split','timm/test_resnet'])
    assert 'No external test gave figures' in page.read_text()
    cells = thesis_cells(['FLAIR'], ['timm/test_resnet'])
    split = pd.read_csv(tmp_path/'out/split/sweep.csv').fillna({'error':''})
    tests = thesis_external(store, tcga, tmp_path/'out', cells, split, override=['space','spacing'], progress=False)
    assert (tests.error=='').all() and all(t['overridden'] for t in tests.result)


def test_the_command(tmp_path):
    "As the installed script calls it"
    where = tmp_path/'store',tmp_path/'tcga',tmp_path/'out'
    def run(*more): return run_command('mgmt_thesis', *where, '--quick', *more)
    quick_stores(tmp_path/'store', tmp_path/'tcga', **SMALL)
    r = run('--archs','timm/test_resnet','--n-jobs','1')
    assert r.returncode==0, r.stderr
    assert 'thesis.html: 5 of 5 runs and tests; research use only' in r.stdout and 'Traceback' not in r.stderr
    settled = json.loads((tmp_path/'out/experiment.json').read_text())
    assert (settled['recipe'], settled['n_folds'], settled['archs'])==('published', 2, ['timm/test_resnet'])
    r = run('--archs','xception')
    assert r.returncode==2 and 'another experiment' in r.stderr and 'Traceback' not in r.stderr
    model = next((tmp_path/'out/folds').rglob('model.json'))
    assert load_model(model).recipe.freeze=='all_but_keras=15,weights'
