"Each recipe from scans to a prediction, its choices one by one, and what its preparation does to odd series."
import json

import numpy as np
import pandas as pd
import pytest
import torch

from mgmt_fast.augment import mgmt_augs
from mgmt_fast.cohort import kaggle_cohort
from choices import other_value
from mgmt_fast.core import SEQUENCES, MGMTError, _choices, get_recipe, rng_for
from mgmt_fast.learner import load_model, mgmt_learner, predict, recipe_dls, save_model
from mgmt_fast.phantom import make_phantom, render_patient, draw_patients, write_series
from mgmt_fast.prepare import VolumeStore, prepare, prepare_patient
from mgmt_fast.recipes import compare_recipes, faults
from mgmt_fast.slicewise import pick_slices, read_stack, slice_boxes, slicewise, slicewise_patient

NAMES = ('default','published','winner')
ROOMS = ('prepare','augment','backbones','learner')
SMALL = dict(size=(16,48,48), epochs=1, bs=4, pretrained=False)


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp('phantom')/'cohort'
    make_phantom(root, n=14, test=2/14, slices=12, size=48, missing={'00002':['T1wCE']}, progress=False)
    return root


@pytest.mark.parametrize('room', ROOMS)
@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_chooses_in_every_room(name, room):
    r = get_recipe(name)
    assert set(r.room(room))=={k for k,c in _choices.items() if c.room==room}
    assert json.loads(json.dumps(r.values())).keys()==r.values().keys()


@pytest.mark.parametrize('name', NAMES)
def test_every_choice_is_printed_and_can_be_changed_alone(name):
    r = get_recipe(name)
    for k,v in r.values().items():
        if _choices[k].room not in ROOMS: continue
        other = other_value(k, v)
        changed = get_recipe(r, **{k:other})
        assert changed[k]==other and all(changed[o]==r[o] for o in r.values() if o!=k)
        assert k in repr(changed) and changed.to_frame().query('changed=="*"').choice.tolist()==[k]
        assert r[k]==v


def test_the_thesis_table_of_settings():
    r = get_recipe('published')
    assert (tuple(r.size), r.bs, r.epochs, r.lr, r.schedule, r.l2, r.patience, r.freeze, r.head, r.arch)==((64,256,256),
        8,10,1e-4,'flat',1e-5,3,'all_but_keras=15,weights','published','efficientnet_b1')
    w = get_recipe('winner')
    assert (w.sequences, w.slice_pick, w.voi_lut, w.short_series, w.arch, w.pretrained, w.bs, w.epochs)==(('T1wCE',),
        'largest',True,'zeros','resnet10',False,8,15)
    assert mgmt_augs('winner')==[]


def test_the_table_of_faults_follows_the_registry():
    f = faults('published')
    assert set(f.fault)=={*range(1,10),12} and set(f.choice)<=set(_choices)
    for r in f.itertuples():
        assert r.here==get_recipe('published')[r.choice] and r.default==get_recipe('default')[r.choice]
        if r.on: assert not faults(get_recipe('published', **{r.choice: r.default})).set_index('choice').on[r.choice]
    assert set(compare_recipes(differ=True).choice)<set(compare_recipes().choice)


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_runs_from_scans_to_a_prediction(name, cohort, tmp_path, capsys):
    recipe = get_recipe(name, **SMALL)
    train,test = kaggle_cohort(cohort),kaggle_cohort(cohort,'test')
    store = prepare(train, tmp_path/'store', recipe=recipe, progress=False)
    assert not (store.report.level=='error').any()
    dls = recipe_dls(store, recipe, n_folds=3)
    assert dls.sequences==(('T1wCE',) if name=='winner' else SEQUENCES)
    learn = mgmt_learner(dls, recipe=recipe, path=tmp_path/'run')
    assert ('faults included' in capsys.readouterr().out)==(name=='published')
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert len(pd.read_csv(tmp_path/'run'/'history.csv'))==1
    save_model(learn, tmp_path/'model')
    m = load_model(tmp_path/'model')
    assert m.recipe==learn.recipe and m.prepared==SEQUENCES
    preds = predict(m, test, n_workers=1, progress=False)
    again = prepare(test, tmp_path/'again', recipe=recipe, n_workers=1, progress=False)
    assert preds.prob.notna().all()
    assert preds.prob.tolist()==predict(learn, again, progress=False).prob.tolist()
    if name!='default':
        with pytest.raises(MGMTError, match='prepared otherwise'):
            predict(m, prepare(test, tmp_path/'other', recipe=get_recipe('default', size=(16,48,48)), n_workers=1,
                progress=False), progress=False)


def test_weights_from_a_folder_leave_no_path_in_the_model(cohort, tmp_path):
    from mgmt_fast.networks import create_network
    import safetensors.torch as st, timm
    secret = tmp_path/'Quillfeather'; secret.mkdir()
    st.save_file(timm.create_model('resnet18', num_classes=0).state_dict(), secret/'resnet18.safetensors')
    store = prepare(kaggle_cohort(cohort), tmp_path/'store', 'FLAIR', size=(8,32,32), n_workers=1, progress=False)
    for network in ('3d','2d'):
        learn = mgmt_learner(recipe_dls(store, n_folds=3),
            recipe=get_recipe('default', pretrained=str(secret), network=network), path=tmp_path/'run')
        save_model(learn, tmp_path/network)
        assert str(tmp_path) not in (tmp_path/f'{network}.json').read_text()
        load_model(tmp_path/network)


@pytest.mark.parametrize('arch,share', [('efficientnet_b0',255), ('resnet18',1), ('densenet121',1), ('xception',1)])
def test_dividing_twice_is_an_efficientnet_that_sees_255_times_less(cohort, tmp_path, arch, share):
    "The others have no layer for it in the thesis' libraries, wherever intensities are standardized"
    store = prepare(kaggle_cohort(cohort), tmp_path/'store', 'FLAIR', size=(8,32,32), n_workers=1, progress=False)
    def network(**choices):
        r = get_recipe('default', arch=arch, **choices)
        return mgmt_learner(recipe_dls(store, n_folds=3), recipe=r, path=tmp_path).model.eval()
    x = torch.rand(2,1,8,32,32)
    once,twice = (network(double_rescale=o) for o in (False,True))
    with torch.no_grad(): torch.testing.assert_close(twice(x), once(x/share), rtol=1e-4, atol=1e-5)
    inside = dict(stem='adapter', standardize='backbone')
    once,twice = (network(double_rescale=o, **inside).body for o in (False,True))
    y = torch.rand(2,3,8,32,32)
    torch.testing.assert_close(twice.inside(y), once.inside(y/share), rtol=1e-4, atol=1e-5)


def test_too_few_for_a_batch_is_said(cohort, tmp_path):
    store = prepare(kaggle_cohort(cohort), tmp_path/'store', 'FLAIR', size=(8,32,32), n_workers=1, progress=False)
    with pytest.raises(MGMTError, match='make no batch of 16'): recipe_dls(store, get_recipe('winner', bs=16), 'FLAIR')


@pytest.mark.parametrize('choice,value', [('slice_order','name'),('slice_pick','midle'),('crop_by','slices'),
    ('range_by','x'),('short_series','zero'),('black_slices','drop'),('prepare_by','slices')])
def test_unknown_values_are_named(choice, value, cohort):
    with pytest.raises(MGMTError, match=choice):
        prepare_patient(kaggle_cohort(cohort).iloc[0],
            recipe=get_recipe('published', size=(8,32,32), **{choice: value}))


@pytest.mark.parametrize('seed', range(20))
def test_picked_slices_are_of_the_stack(seed):
    rng = rng_for(seed, 'pick')
    n,D = int(rng.integers(1,200)),int(rng.integers(1,100))
    area = rng.integers(0, 50, n)
    for how in ('middle','largest','spread'):
        at = pick_slices(area, D, how)
        assert 0<len(at)<=D and at[0]>=0 and at[-1]<n and (np.diff(at)>0).all()
        if how!='spread': assert (np.diff(at)==1).all() and (at==(n//2 if how=='middle' else area.argmax())).any()
        if n<=D and how!='largest': assert len(at)==n
    written = list(range(n))[n//2-D//2:n//2-D//2+D]
    assert pick_slices(area, D, 'middle', wrap=True).tolist()==written


@pytest.mark.parametrize('seed', range(5))
def test_boxes_hold_all_that_is_not_black(seed):
    rng = rng_for(seed, 'boxes')
    x = rng.random((6,9,11))*(rng.random((6,9,11))<.1)
    for a,(r0,r1,c0,c1) in zip(x, slice_boxes(x)):
        out = a.copy(); out[r0:r1,c0:c1] = 0
        assert not out.any()
        if a.any(): assert a[r0].any() and a[r1-1].any() and a[:,c0].any() and a[:,c1-1].any()


def test_slicewise_repeats_and_depends_on_no_other_patient(cohort):
    rows = kaggle_cohort(cohort)
    r = get_recipe('published', size=(24,32,32))
    a,b = (slicewise_patient(rows.iloc[3], s, r).arrays['T1w'] for s in (SEQUENCES,('T1w',)))
    assert (a==b).all()
    brighter = a[12:]
    assert brighter.any((1,2)).all() and len({o.tobytes() for o in a})<24 # copies of copies of 12 slices


def test_odd_series(cohort, tmp_path):
    "One slice; black slices; a NIfTI; a VOI window that clips; two volumes in one folder"
    import nibabel as nib, pydicom
    r = get_recipe('published', size=(8,32,32))
    x = np.zeros((1,20,30), np.float32); x[0,3:9,5:25] = np.arange(20)
    assert slicewise(x, 'FLAIR', r).shape==(8,32,32)
    x = np.zeros((40,20,30)); x[0,3:9,5:25] = 5; x[0,4,6] = 9
    assert slicewise(x, 'FLAIR', r).any((1,2)).all()
    with pytest.raises(MGMTError, match='picked are all constant'):
        slicewise(x, 'FLAIR', get_recipe(r, black_slices='keep'))
    v = render_patient(draw_patients(1).iloc[0], sequences=['T1wCE'], slices=12, size=32)['T1wCE'][0]
    nib.save(nib.Nifti1Image(np.asarray(v, dtype=np.int16).transpose(2,1,0), np.eye(4)), tmp_path/'T1wCE.nii.gz')
    assert read_stack(tmp_path/'T1wCE.nii.gz').shape==(12,32,32)
    write_series(v, tmp_path/'dcm', 'T1wCE', 'p')
    for f in (tmp_path/'dcm').iterdir():
        ds = pydicom.dcmread(f); ds.WindowCenter,ds.WindowWidth = 100,50; ds.save_as(f)
    raw,seen = read_stack(tmp_path/'dcm'),read_stack(tmp_path/'dcm', voi_lut=True)
    assert (raw==np.asarray(v)).all() and (seen[raw<=74]==seen.min()).all() and (seen[raw>=126]==seen.max()).all()
    for f in (tmp_path/'dcm').iterdir():
        ds = pydicom.dcmread(f); ds.WindowWidth = 0; ds.save_as(f)
    with pytest.raises(MGMTError, match='voi_lut=False'): read_stack(tmp_path/'dcm', voi_lut=True)


def test_a_store_of_slices_has_no_millimetres(cohort, tmp_path):
    store = prepare(kaggle_cohort(cohort).iloc[:4], tmp_path/'store', 'FLAIR,T1wCE',
        recipe=get_recipe('winner', size=(8,32,32)), n_workers=1, progress=False)
    assert store.spacing is None and VolumeStore(store.path).recipe.slice_pick=='largest'
    assert store.report.what.str.contains('without millimetres').sum()==4
    assert store.table.T1wCE.tolist()==[True,True,False,True]
