"Fusions as laws, on networks that were not trained: what is fused, saved, lacking or wrong."
import json

import numpy as np
import pandas as pd
import pytest
import torch

from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError, get_recipe, rng_for
from mgmt_fast.fusion import FusionModel, fuse, fused_oof, out_of_fold
from mgmt_fast.learner import MGMTModel, load_model, predict, save_model
from mgmt_fast.metrics import auc_ci
from mgmt_fast.networks import create_network
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import prepare

SEQS = ('FLAIR','T1wCE')
ARCH = 'timm/resnet10t'
RECIPE = get_recipe('default', size=(8,32,32), arch=ARCH)


def network(sequences, seed, **kwargs):
    torch.manual_seed(seed)
    kwargs = kwargs if kwargs.get('network')=='2d' else dict(anisotropic=2, **kwargs)
    return MGMTModel(create_network(arch=ARCH, in_chans=len(sequences), **kwargs).eval(), RECIPE, sequences,
        prepared=SEQS)


@pytest.fixture(scope='module')
def parts(): return {s: network((s,), i) for i,s in enumerate(SEQS)}


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp('phantom')/'cohort'
    make_phantom(root, n=12, test=0, slices=8, size=32, sequences=SEQS, missing={'00001':['FLAIR'],'00004':['T1wCE']},
        progress=False)
    return kaggle_cohort(root)


@pytest.fixture(scope='module')
def store(cohort, tmp_path_factory):
    return prepare(cohort, tmp_path_factory.mktemp('store')/'s', SEQS, recipe=RECIPE, n_workers=1, progress=False)


def logits(p): return np.log(p.prob/(1-p.prob)).to_numpy()


def made_up(n=200, seed=0):
    rng = rng_for(seed, 'made up')
    y = rng.integers(0, 2, n)
    return pd.DataFrame(dict(patient=[f'{i:04d}' for i in range(n)], label=y, FLAIR=y+rng.standard_normal(n),
        T1wCE=y+rng.standard_normal(n), age=60-5*y+8*rng.standard_normal(n)))


def test_the_mean_is_that_of_what_there_is(parts, store):
    a,b,f = (logits(predict(m, store, progress=False)) for m in (*parts.values(), fuse(parts)))
    np.testing.assert_allclose(f, np.nanmean([a,b], axis=0), atol=1e-4)
    assert np.isnan(a).sum()==np.isnan(b).sum()==1 and not np.isnan(f).any()


def test_from_scans_as_from_a_store(parts, cohort, store):
    f = fuse(parts, made_up())
    assert predict(f, cohort, n_workers=1, progress=False).prob.tolist()==predict(f, store,
        progress=False).prob.tolist()


def test_regressions_are_those_of_the_saved_json(parts, store, tmp_path):
    save_model(fuse(parts, made_up()), tmp_path/'f')
    d = json.loads((tmp_path/'f.json').read_text())
    assert {o.suffix for o in tmp_path.iterdir()}=={'.json','.safetensors'} and len(d['weights'])==3
    a,b = (logits(predict(m, store, progress=False)) for m in parts.values())
    w,k = d['weights'],np.isnan(a)*1+np.isnan(b)*2
    want = np.select([k==0,k==1,k==2], [w['FLAIR,T1wCE'][0]+w['FLAIR,T1wCE'][1]*a+w['FLAIR,T1wCE'][2]*b,
        w['T1wCE'][0]+w['T1wCE'][1]*b, w['FLAIR'][0]+w['FLAIR'][1]*a])
    np.testing.assert_allclose(logits(predict(tmp_path/'f', store, progress=False)), want, atol=1e-4)


@pytest.mark.parametrize('kind', ['fusion of fusions','hybrid','siamese','2d','adapter1x1'])
def test_every_kind_is_loaded_as_saved(kind, parts, store, tmp_path):
    m = {'fusion of fusions': lambda: fuse(dict(a=fuse(parts), b=parts['FLAIR'])),
        'hybrid': lambda: fuse(dict(FLAIR=parts['FLAIR']), made_up(), ['age']),
        'siamese': lambda: network(SEQS, 3, network='siamese'), '2d': lambda: network(SEQS, 5, network='2d', slices=8),
        'adapter1x1': lambda: network(SEQS, 4, stem='adapter1x1')}[kind]()
    if kind=='siamese': m.model.head.prototypes.copy_(torch.randn(2,32))
    save_model(m, tmp_path/'m')
    ages = pd.DataFrame(dict(patient=store.table.patient, age=range(50,62)))
    a,b = (predict(o, store, progress=False, features=ages) for o in (m, load_model(tmp_path/'m.json')))
    assert a.prob.equals(b.prob) and a.note.equals(b.note) and a.prob.nunique()>8
    if kind=='hybrid':
        assert (predict(m, store, progress=False, features=ages.assign(age='F')).prob.dropna()!=a.prob.dropna()).all()


def test_weights_are_found_and_more_inputs_do_not_hurt():
    oof = made_up(2000)
    one,two,three = (auc_ci(oof.label, fused_oof(oof, p, f).logit).auc
        for p,f in ((['FLAIR'],()),(['FLAIR','T1wCE'],()),(['FLAIR','T1wCE'],['age'])))
    assert one<two<three
    noise = oof.assign(T1wCE=rng_for(1,'noise').standard_normal(2000))
    assert abs(auc_ci(oof.label, fused_oof(noise, ['FLAIR','T1wCE']).logit).auc-one)<.01


def test_a_null_stays_a_null():
    "Labels that know nothing of the logits: the cross-fitted regression finds no AUC beyond chance"
    aucs = []
    for s in range(20):
        oof = made_up(120, s)
        oof['label'] = rng_for(s,'null').permutation(oof.label)
        aucs.append(auc_ci(oof.label, fused_oof(oof, ['FLAIR','T1wCE'], ['age'], seed=s).logit).auc)
    assert abs(np.mean(aucs)-.5)<.05


def test_every_patient_is_out_of_fold_once(store, tmp_path, capsys):
    t,m = out_of_fold(store, get_recipe(RECIPE, epochs=1), 'FLAIR', tmp_path, n_folds=2, progress=False)
    assert t.patient.tolist()==[p for p in store.table.patient if p!='00001'] and set(t.fold)=={0,1}
    assert t.logit.notna().all()
    assert list(m.parts)==['fold0','fold1'] and m.parts['fold0'].prepared==SEQS
    for k,g in t.groupby('fold'):
        np.testing.assert_allclose(g.logit, logits(predict(m.parts[f'fold{k}'], store, progress=False))[
            store.table.patient.isin(g.patient)], atol=1e-4)


def test_folds_are_trained_once(store, tmp_path):
    "A run that was stopped goes on behind the last fold that was trained; other epochs or a damaged file train again"
    def run(epochs=1):
        t,_ = out_of_fold(store, get_recipe(RECIPE, epochs=epochs), 'FLAIR', tmp_path, n_folds=2, progress=False)
        return t,[(tmp_path/f'fold{k}'/'fold.json').stat().st_mtime_ns for k in (0,1)]
    first,written = run()
    (tmp_path/'fold1'/'model.safetensors').write_bytes(b'cut off')
    again,after = run()
    pd.testing.assert_frame_equal(first, again)
    assert after[0]==written[0] and after[1]!=written[1]
    other,trained = run(epochs=2)
    assert trained[0]!=after[0] and not np.allclose(other.logit, first.logit)


@pytest.mark.parametrize('change,what', [(lambda d: d.drop(columns='FLAIR'),'lacks FLAIR'),
    (lambda d: d[d.label==0],'five patients of each class'), (lambda d: d.assign(FLAIR=np.nan),'five patients'),
    (lambda d: d.assign(age='old'),"received 'old'"), (lambda d: d.drop(columns='label'),'lacks label')])
def test_tables_that_cannot_be_fitted_on(change, what, parts):
    with pytest.raises(MGMTError, match=what): fuse(parts, change(made_up()), ['age'])


def test_bad_models(parts, store, tmp_path):
    with pytest.raises(MGMTError, match='one model at least'): fuse({})
    with pytest.raises(MGMTError, match='named by letters'): fuse({'../x': parts['FLAIR']})
    with pytest.raises(MGMTError, match='features need weights'): fuse(parts, features=['age'])
    with pytest.raises(MGMTError, match='8 of them at most'):
        fuse(parts, made_up().assign(**{f'x{i}':0 for i in range(8)}), [f'x{i}' for i in range(8)])
    save_model(fuse(parts), tmp_path/'f')
    (tmp_path/'f-FLAIR.safetensors').unlink()
    with pytest.raises(MGMTError, match='f-FLAIR.safetensors is missing'): load_model(tmp_path/'f')
    d = json.loads((tmp_path/'f.json').read_text())
    (tmp_path/'g.json').write_text(json.dumps({**d, 'parts':{'FLAIR':'../f-FLAIR'}}))
    with pytest.raises(MGMTError, match='other folders'): load_model(tmp_path/'g')
    (tmp_path/'g.json').write_text(json.dumps({**d, 'kind':'fusoin'}))
    with pytest.raises(MGMTError, match="did you mean 'fusion'"): load_model(tmp_path/'g')
    (tmp_path/'g.json').write_text('{"kind":')
    with pytest.raises(MGMTError, match='no JSON'): load_model(tmp_path/'g')


def test_parts_prepared_apart_are_each_given_their_own(parts, cohort):
    "Two preparations in one fusion: each part sees the volumes that its own recipe makes"
    other = MGMTModel(parts['T1wCE'].model, get_recipe('winner', size=(8,32,32)), ('T1wCE',))
    f = fuse(dict(a=parts['FLAIR'], b=other))
    a,b,c = (logits(predict(m, cohort.iloc[[0,2]], n_workers=1, progress=False)) for m in (parts['FLAIR'], other, f))
    assert len(f.needs())==2
    np.testing.assert_allclose(c, (a+b)/2, atol=1e-4)
