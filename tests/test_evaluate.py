"The protocol: what it measures, and what it refuses."
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import Learner
from scipy.special import expit

from mgmt_fast.backbones import create_backbone
from mgmt_fast.baselines import baselines, subgroups
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError, get_recipe, rng_for
from mgmt_fast.bundle import *
from mgmt_fast.callbacks import OutOfTime
from mgmt_fast.evaluate import *
from mgmt_fast.external import *
from mgmt_fast.records import ProtocolError
from mgmt_fast.learner import MGMTModel, save_model
from mgmt_fast.metrics import auc_ci
from mgmt_fast.phantom import make_phantom, read_side_table
from mgmt_fast.prepare import VolumeStore, prepare


def fake_oof(strength=1., n=60, archs=('a',), sequences=('FLAIR','T1wCE'), repeats=1, members=1, seed=0):
    "Out-of-fold predictions as `cross_validate` returns them, of models with noise of their own"
    rng,y,rows = rng_for(seed, 'fake_oof'),np.arange(n)%2,[]
    for arch in archs:
        for s in sequences:
            for r in range(repeats):
                for m in range(members):
                    z,fold = strength*(2*y-1)+rng.normal(size=n),np.arange(n)//2%3
                    rows.append(pd.DataFrame(dict(patient=[f'{i:03d}' for i in range(n)], label=y, arch=arch,
                        sequences=s, recipe='default', repeat=r, fold=fold, member=m, raw=expit(z), tta=np.nan,
                        prob=expit(z),
                        run=[f'{arch}{s}{r}{m}{f}' for f in fold], temperature=1., threshold=.5,
                        valid_loss=.5+rng.random())))
    return pd.concat(rows, ignore_index=True)


def test_results_agree_with_one_run_and_average_over_several():
    one,two = fake_oof(sequences=['FLAIR']),fake_oof(sequences=['FLAIR'], members=2)
    r = results_table(one).iloc[0]
    np.testing.assert_allclose(r[['auc','auc_lo','auc_hi']].astype(float), auc_ci(one.label, one.prob))
    r = results_table(two).iloc[0]
    assert r.auc==pytest.approx(np.mean([auc_ci(t.label, t.prob).auc for _,t in two.groupby('member')])) and r.runs==2


def test_the_interval_of_a_mean_auc_is_narrower_than_that_of_one_run():
    y,rng = np.arange(80)%2,rng_for(0,'mean')
    P = [y+rng.normal(size=80)*2 for _ in range(8)]
    widths = [np.ptp(auc_ci(y, p)[['lo','hi']]) for p in P]
    assert np.ptp(mean_auc_ci(y, P)[['lo','hi']])<min(widths)


def test_an_ensemble_of_noisy_models_gains_and_of_one_model_twice_does_not():
    oof = fake_oof(.6, n=200)
    g = gains(oof)
    assert (g.gain>0).all() and (g.lo<g.gain).all() and (g.gain<g.hi).all() and (g.p_holm>=g.p).all()
    twice = pd.concat([o.assign(sequences=s) for s in ('FLAIR','T2w') for o in [oof[oof.sequences=='FLAIR']]])
    np.testing.assert_allclose(gains(twice).gain, 0, atol=1e-12)


def test_selection_inside_takes_the_lowest_inner_loss_of_each_run():
    oof = fake_oof()
    oof.loc[oof.sequences=='T1wCE','valid_loss'] -= 2*(oof.fold!=1)
    chosen = select_inside(oof)
    assert chosen.patient.is_unique and len(chosen)==oof.patient.nunique() and set(chosen.arch)=={'selected'}
    assert {f: set(t.run.str.contains('T1wCE')) for f,t in chosen.groupby('fold')}.items()>={0:{True}, 2:{True}}.items()


@pytest.mark.parametrize('spoil,says', [
    (lambda t: pd.concat([t,t[:1]]), 'do folds share patients'), (lambda t: t.assign(label=1), 'both classes'),
    (lambda t: t.assign(prob=.4), 'tell patients apart'),
    (lambda t: t.assign(prob=2.*t.prob), r'\[0,1\]'),
    (lambda t: t.assign(prob=t.prob.where(t.prob<.9)), 'missing|finite'), (lambda t: t[:8], 'too few')])
def test_no_number_of_a_bad_table(spoil, says):
    with pytest.raises(MGMTError, match=says): results_table(spoil(fake_oof(sequences=['FLAIR'])))


def phantom_store(dest, n, slices=12, first=0, seed=0, **kwargs):
    "A store of phantoms whose patients are numbered from `first`"
    make_phantom(dest/'scans', n=n, test=0., auc=.9, slices=slices, size=32, sequences='T1wCE', seed=seed, n_workers=0,
        progress=False, **kwargs)
    c = kaggle_cohort(dest/'scans')
    return prepare(c.assign(patient=[f'{first+int(p):05d}' for p in c.patient]), dest/'store', 'T1wCE', size=(8,24,24),
        n_workers=1, progress=False)


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """Stores for training and test, and an untrained model in a bundle: what a bundle refuses has nothing to do with
    how good it is"""
    d = tmp_path_factory.mktemp('study')
    train,test = phantom_store(d/'train', 30),phantom_store(d/'test', 24, first=900, seed=1)
    torch.manual_seed(0)
    model = MGMTModel(create_backbone('timm/test_resnet', anisotropic=2),
        get_recipe('default', arch='timm/test_resnet', size=(8,24,24)), ('T1wCE',))
    save_model(model, d/'model')
    v = train.table[['patient','label']].assign(prob=rng_for(0,'v').random(30))
    freeze_bundle(d/'model', v, train, d/'bundle')
    return d


@pytest.fixture
def copy_of(study, tmp_path):
    "A study of its own, for tests that leave traces"
    shutil.copytree(study, tmp_path/'study')
    d = tmp_path/'study'
    return d,Bundle(d/'bundle'),VolumeStore(d/'test/store')


def test_a_second_pass_says_so(copy_of):
    d,b,test = copy_of
    one,two = (external_test(b, test, progress=False) for _ in range(2))
    assert (one['pass'],two['pass'])==(1,2) and 'pass 2' in two['note'] and one['all']==two['all']
    assert read_result(d/'bundle'/two['predictions']['file'].replace('.csv','.json'))==two


class Stopped(BaseException): pass


def stop_at(monkeypatch, k):
    "A process that is stopped before its `k`-th file appears."
    n,move = [0],os.replace
    def replace(a, b):
        n[0] += 1
        if n[0]==k: raise Stopped
        move(a, b)
    monkeypatch.setattr(os, 'replace', replace)


@pytest.mark.parametrize('k', range(1, 10))
def test_a_pass_that_was_stopped_is_finished_as_the_same_pass(study, copy_of, monkeypatch, k):
    d,b,test = copy_of
    with monkeypatch.context() as m:
        stop_at(m, k)
        if k<=8:
            with pytest.raises(Stopped): external_test(b, test, progress=False)
        else: external_test(b, test, progress=False)
    last = external_test(b, test, progress=False)
    assert last['pass']==(1 if k<=8 else 2)
    assert read_result(d/'bundle'/last['predictions']['file'].replace('.csv','.json'))==last
    assert external_test(b, test, progress=False)['pass']==last['pass']+1


def test_a_line_that_a_stop_cut_off_is_no_line_of_the_ledger(copy_of):
    d,b,test = copy_of
    external_test(b, test, progress=False)
    ledger = d/'bundle/ledger.jsonl'
    ledger.write_text(ledger.read_text()+'{"date": "2026-')
    assert external_test(b, test, progress=False)['pass']==2


def test_too_few_patients_are_refused_before_anything_is_trained(study, tmp_path):
    with pytest.raises(ProtocolError, match='24 training patients with inner=5 leave [45] .* at least 10 are needed: '
        '50 training patients'):
        cross_validate(VolumeStore(study/'train/store'), tmp_path/'cv', progress=False)
    assert not (tmp_path/'cv').exists()


def test_a_part_of_the_cohort_under_other_names_is_met_again(copy_of):
    d,b,test = copy_of
    external_test(b, test, progress=False)
    c = kaggle_cohort(d/'test/scans')[:16]
    other = prepare(c.assign(patient=[f'other-{i}' for i in range(16)]), d/'renamed', 'T1wCE', size=(8,24,24),
        n_workers=1, progress=False)
    assert external_test(b, other, progress=False)['pass']==2


def test_a_label_without_scans_tests_nobody(copy_of):
    "A label table may cover the training patients too"
    d,b,test = copy_of
    c = kaggle_cohort(d/'test/scans')
    c = pd.concat([c.assign(patient=[f'{900+int(p):05d}' for p in c.patient]), c[:1].assign(T1wCE=None)],
        ignore_index=True)
    other = prepare(c, d/'more', 'T1wCE', size=(8,24,24), n_workers=1, progress=False)
    r = external_test(b, other, progress=False)
    assert r['all']['n']==24 and [o['patient'] for o in r['cohort']['left_out']]==['00000']


def test_with_and_without_suspected_overlaps(copy_of):
    d,b,test = copy_of
    report = pd.DataFrame(dict(train=['00000']*3, test=['00900','00901','00902'], sequence='T1wCE',
        verdict=['same','uncertain','different']))
    r = external_test(b, test, leakage=report, progress=False)
    assert r['leakage']['set_aside']==['00900','00901'] and r['all']['n']==24 and r['without_suspected']['n']==22
    r = external_test(b, test, leakage=test.table.patient[:18].tolist(), progress=False)
    assert 'too few' in r['without_suspected']['why']
    with pytest.raises(MGMTError, match='not in this cohort'): external_test(b, test, leakage=['77777'])
    assert pd.read_json(d/'bundle/ledger.jsonl', lines=True)['pass'].notna().sum()==2


def test_the_list_that_an_audit_wrote_is_taken(copy_of):
    d,b,test = copy_of
    pd.DataFrame(dict(patient=['00900'])).to_csv(d/'set_aside.csv', index=False)
    assert external_test(b, test, leakage=d/'set_aside.csv', progress=False)['leakage']['set_aside']==['00900']


@pytest.mark.parametrize('kwargs', [dict(recalibrate=True), dict(threshold=.3), dict(fit=True), dict(arch='resnet10')])
def test_nothing_is_fitted_on_the_test_set(copy_of, kwargs):
    d,b,test = copy_of
    with pytest.raises(ProtocolError, match='a test cohort is for testing'): external_test(b, test, **kwargs)
    with pytest.raises(ProtocolError, match='frozen'): b.threshold = .3
    assert not (d/'bundle/ledger.jsonl').exists()


def test_a_cohort_that_was_tested_cannot_be_trained_on(copy_of):
    d,b,test = copy_of
    external_test(b, test, progress=False)
    with pytest.raises(ProtocolError, match='external test'): cross_validate(test, d/'cv')
    with pytest.raises(ProtocolError, match='external test'):
        freeze_bundle(d/'model', test.table.assign(prob=np.linspace(.1,.9,len(test))), test, d/'b2')


@pytest.mark.parametrize('file', ['bundle.json','model-0.safetensors','model-0.json'])
def test_a_changed_bundle_is_found_out(copy_of, file):
    d,_,test = copy_of
    path = d/'bundle'/file
    raw = bytearray(path.read_bytes())
    raw[len(raw)//2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ProtocolError): external_test(d/'bundle', test)


def test_a_changed_ledger_or_result_is_found_out(copy_of):
    d,b,test = copy_of
    r = external_test(b, test, progress=False)
    path = d/'bundle'/r['predictions']['file']
    result,ledger = path.with_suffix('.json'),d/'bundle/ledger.jsonl'
    old = ledger.read_text()
    ledger.write_text(old.replace('"pass": 1', '"pass": 0'))
    with pytest.raises(ProtocolError, match='by hand'): external_test(b, test)
    ledger.unlink()
    with pytest.raises(ProtocolError, match='entries are missing'): external_test(b, test)
    ledger.write_text(old)
    path.write_text(path.read_text()+'\n')
    with pytest.raises(ProtocolError, match='was changed'): read_result(result)
    result.write_text(result.read_text().replace('"pass": 1', '"pass": 3'))
    with pytest.raises(ProtocolError, match='signed'): read_result(result)


def test_patients_of_training_are_not_tested(copy_of, tmp_path):
    d,b,_ = copy_of
    with pytest.raises(ProtocolError, match='in training and test'): external_test(b, VolumeStore(d/'train/store'))
    c = kaggle_cohort(d/'train/scans')[:12]
    twins = prepare(c.assign(patient=[f'twin-{i}' for i in range(12)]), tmp_path/'twins', 'T1wCE', size=(8,24,24),
        n_workers=1, progress=False)
    with pytest.raises(ProtocolError, match='equal to the voxel'): external_test(b, twins)


def test_another_preparation_is_refused_unless_it_is_named(copy_of, tmp_path):
    d,b,_ = copy_of
    thick = phantom_store(tmp_path, 14, slices=8, first=500, seed=2)
    with pytest.raises(ProtocolError, match="override=.'space', 'spacing'."): external_test(b, thick)
    with pytest.raises(MGMTError, match='spacing'): external_test(b, thick, override='spcing')
    r = external_test(b, thick, override=('space','spacing'), progress=False)
    assert {o['what'] for o in r['overridden']}=={'space','spacing'}
    other = prepare(kaggle_cohort(d/'test/scans').assign(patient=lambda t: 'x'+t.patient), tmp_path/'size', 'T1wCE',
        size=(8,16,16), n_workers=1, progress=False)
    with pytest.raises(MGMTError, match='prepared otherwise'): external_test(b, other)


def test_labels_decide_who_is_scored(copy_of):
    _,b,test = copy_of
    test.table.loc[:4,'label'] = pd.NA
    r = external_test(b, test, progress=False)
    assert r['all']['n']==19 and [o['why'] for o in r['cohort']['left_out']]==['no label']*5
    test.table['label'] = test.table.label.mask(test.table.label.notna(), 1)
    with pytest.raises(MGMTError, match='both classes'): external_test(b, test)


@pytest.fixture(scope='module')
def larger(tmp_path_factory):
    "A store that can be divided twice"
    return phantom_store(tmp_path_factory.mktemp('larger'), 48)


def test_folds_are_kept_and_used_again(larger, tmp_path, monkeypatch):
    "An interruption costs the run that was under way; other inputs cost all that depends on them."
    kw = dict(recipe=get_recipe('default', arch='timm/test_resnet', anisotropic=2, epochs=1), n_folds=2, inner=2,
        progress=False)
    fits,fit = [],Learner.fit
    def counted(self, *args, **kwargs):
        if len(fits)==1 and not resumed: raise KeyboardInterrupt
        fits.append(1); return fit(self, *args, **kwargs)
    monkeypatch.setattr(Learner, 'fit', counted)
    resumed = False
    with pytest.raises(KeyboardInterrupt): cross_validate(larger, tmp_path/'cv', **kw)
    resumed = True
    oof = cross_validate(larger, tmp_path/'cv', **kw)
    assert len(fits)==2
    again = cross_validate(larger, tmp_path/'cv', **kw)
    assert len(fits)==2
    pd.testing.assert_frame_equal(oof, again)
    pd.testing.assert_frame_equal(oof, read_oof(tmp_path/'cv'))
    assert sorted(oof.patient)==sorted(larger.table.patient) and oof.prob.between(0,1).all()
    for _,t in oof.groupby('run'):
        j = json.loads((tmp_path/'cv/runs'/t.run.iloc[0]/'run.json').read_text())
        assert j['valid_patients']==12 and set(j['predictions']['patient'])==set(t.patient)
    run = tmp_path/'cv/runs'/oof.run[0]/'model.safetensors'
    raw = bytearray(run.read_bytes())
    raw[-1] ^= 1
    run.write_bytes(raw)
    damaged = cross_validate(larger, tmp_path/'cv', **kw)
    pd.testing.assert_frame_equal(oof, damaged) # trained again, to the bit
    assert len(fits)==3


class Counting:
    "There is time until it has been asked for `n` times"
    def __init__(self, n): self.n = n
    @property
    def left(self):
        self.n -= 1
        return float(self.n>0)


def test_a_training_that_the_clock_stopped_goes_on_to_the_same_bits_and_so_do_two_devices(larger, tmp_path):
    kw = dict(recipe=get_recipe('default', arch='timm/test_resnet', anisotropic=2, epochs=3), n_folds=2, inner=2,
        progress=False)
    whole = cross_validate(larger, tmp_path/'whole', **kw)
    with pytest.raises(OutOfTime, match='before the training'):
        cross_validate(larger, tmp_path/'stopped', clock=Counting(0), **kw)
    with pytest.raises(OutOfTime, match='after 2 of 3 epochs'):
        cross_validate(larger, tmp_path/'stopped', clock=Counting(3), **kw)
    checkpoint, = (tmp_path/'stopped/runs').glob('*/checkpoint.safetensors')
    pd.testing.assert_frame_equal(cross_validate(larger, tmp_path/'stopped', **kw), whole)
    assert len(pd.read_csv(checkpoint.with_name('history.csv')))==3 and not checkpoint.exists()
    pd.testing.assert_frame_equal(cross_validate(larger, tmp_path/'two', devices=['cpu','cpu'], **kw), whole)


def test_cross_validation_refuses_what_gives_no_number(study, tmp_path):
    store = VolumeStore(study/'train/store')
    few = store.only(store.table.patient[:8])
    few.table['label'] = [0,1]*4
    with pytest.raises(ProtocolError, match='too few'): cross_validate(few, tmp_path)
    one = store.only(store.table.patient)
    one.table['label'] = pd.array([1]*30, dtype='Int64')
    with pytest.raises(MGMTError, match='0 unmethylated'): cross_validate(one, tmp_path)
    torn = pd.DataFrame(dict(patient=['BraTS-GLI-00001-000','BraTS-GLI-00001-001'], fold=[0,1]))
    visits = store.only(store.table.patient)
    visits.table.loc[:1,'patient'] = torn.patient.to_numpy()
    with pytest.raises(MGMTError, match='puts scans of'): cross_validate(visits, tmp_path, folds=torn)


def test_a_slice_count_that_follows_the_label_is_caught(tmp_path):
    parts = []
    for slices,label in ((10,0),(13,1)):
        make_phantom(tmp_path/str(label), n=24, auc=.5, test=0., slices=slices, size=32, sequences='T1wCE', seed=1,
            n_workers=0, progress=False)
        c = kaggle_cohort(tmp_path/str(label))
        parts.append(c[c.label==label])
    b = baselines(prepare(pd.concat(parts), tmp_path/'store', 'T1wCE', size=(8,16,16), n_workers=1, progress=False),
        progress=False).set_index('baseline')
    assert b.lo['slice count']>.5 and b.p_holm['slice count']<.05
    assert 'the label shows in the acquisition' in b.note['slice count']


def test_sites_are_read_from_tcga_barcodes():
    n = 60
    p = pd.DataFrame(dict(patient=[f'TCGA-{o:02d}-{i:04d}' for i,o in enumerate([2,6]*30)], label=np.arange(n)//2%2,
        prob=rng_for(0,'tcga').random(n)))
    s = subgroups(p, p)
    assert s.level.tolist()==['02','06'] and s.auc.notna().all() and (s.note=='').all()
