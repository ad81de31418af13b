"""What ran is what is written: every choice of every recipe, through every door, equals the attribute of the object
that carried it out."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from fastai.callback.training import GradientClip

from commands import run_command
import mgmt_fast.all # all rooms, so that all choices are there
from mgmt_fast.augment import RandAffine, mgmt_augs
from mgmt_fast.callbacks import AverageWeights, GradientAccumulation, Precision, ProgressiveSize
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError, Recipe, choice_names, get_recipe, read_recipe, save_recipe
from mgmt_fast.evaluate import cross_validate
from mgmt_fast.fusion import out_of_fold
from mgmt_fast.learner import as_model, load_model, mgmt_learner, recipe_dls, save_model
from mgmt_fast.loader import mgmt_dls
from mgmt_fast.runs import key_changes
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import VolumeStore, prepare
from mgmt_fast.recipes import L2Penalty, StepRate, SummedGradients
from mgmt_fast.sweep import search, sweep, sweep_table

TINY = dict(size=(8,16,16), arch='timm/test_resnet', anisotropic=2, pretrained=False, epochs=1, lr=3e-3, bs=8)


def tiny(name='default', **changes): return get_recipe(name, **{**TINY, **changes})


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    d = tmp_path_factory.mktemp('travels')
    make_phantom(d/'scans', n=24, test=0, auc=.95, seed=2, slices=12, size=32, sequences=('FLAIR','T1wCE'),
        progress=False)
    return kaggle_cohort(d/'scans')


@pytest.fixture(scope='module')
def stores(cohort, tmp_path_factory):
    "A store of each recipe."
    d = tmp_path_factory.mktemp('stores')
    return {k: prepare(cohort, d/k, 'FLAIR,T1wCE', recipe=tiny(k), n_workers=1, progress=False)
        for k in ('default','published','winner')}


def cb(kind, name, without): # what a callback of the learner holds
    return lambda learn: next((getattr(c, name) for c in learn.cbs if isinstance(c, kind)), without)


def aug(part, name): # what a part of the augmentation holds
    def read(learn):
        parts = [p for t in learn.dls.train.after_batch.fs for p in getattr(t, 'parts', [])]
        return next((getattr(p, name) for p in parts if type(p).__name__==part), 'not there')
    return read


def config(name): return lambda learn: learn.model.config[name]


AUGMENT = dict(flip=('RandAffine','flip','h'), rotation=('RandAffine','rotation',20.), shift=('RandAffine','shift',3.),
    shift_fraction=('RandAffine','shift_fraction',(.1,.1)),
    zoom=('RandAffine','zoom',.2), crop_resize=('RandAffine','crop_resize',.9),
    in_plane=('RandAffine','in_plane',False), use_spacing=('RandAffine','use_spacing',False),
    outside=('RandAffine','outside','border'), contrast=('RandLighting','contrast',.4),
    contrast_over=('RandLighting','over','slice'), brightness=('RandLighting','brightness',.3),
    gamma=('RandLighting','gamma',.1), lighting_p=('RandLighting','p',.7), bias_field=('RandBiasField','bias',.2),
    bias_field_p=('RandBiasField','p',.9), noise=('RandNoise','noise',.1),
    noise_kind=('RandNoise','kind','gaussian'), noise_p=('RandNoise','p',.4), blur=('RandBlur','blur',2.),
    blur_p=('RandBlur','p',.3), thick_slices=('RandThickSlices','thick',4.),
    thick_slices_p=('RandThickSlices','p',.2), equalize_p=('RandEqualize','p',.25), cutout_p=('RandCutOut','p',.5))
TRAIN = dict( # choice: another value, what goes with it, where it is
    bs=(4, {}, lambda l: l.dls.train.bs), shuffle=(False, {}, lambda l: l.dls.train.shuffle),
    drop_last=(True, {}, lambda l: l.dls.train.drop_last),
    sequences=(('T1wCE',), {}, lambda l: l.dls.train.dataset.sequences), arch=('resnet10', {}, lambda l: l.model.arch),
    network=('siamese', {}, config('network')),
    anisotropic=(3, {}, config('anisotropic')), head=('published', {}, config('head')),
    stem=('adapter', {}, config('stem')), freeze=('all', {}, config('freeze')),
    double_rescale=(True, dict(arch='efficientnet_b0'), lambda l: float(l.model.standardize.std)>50),
    depth=('full', dict(arch='efficientnet_b0'), lambda l: 'separable' if any(n.endswith('.depth')
    for n,_ in l.model.named_parameters()) else 'full'),
    depth_padding=('zeros', {}, lambda l: next(m.along.mode for m in l.model.modules() if hasattr(m, 'along'))),
    standardize=('backbone', dict(arch='efficientnet_b0'), lambda l: 'backbone' if hasattr(l.model.body.inside, 'mean')
    else 'input'),
    init=('keras', {}, lambda l: 'torch' if l.model.head.fc.bias.any() else 'keras'),
    batch_norm=('keras', {}, lambda l: 'keras' if all(m.eps==1e-3 for m in l.model.body.modules()
    if hasattr(m, 'running_mean')) else 'torch'),
    adam=('keras', {}, lambda l: 'keras' if l.opt_func.keywords['keras'] else 'other'),
    shuffle_2d=(True, dict(network='2d', shuffle=False, arch='resnet18', anisotropic=None),
    lambda l: l.dls.train.shuffle),
    norms=('group', {}, lambda l: 'group' if any('GroupNorm' in type(m).__name__ for m in l.model.modules())
    else 'batch'),
    summed_batches=(2, {}, cb(SummedGradients,'n',1)), accumulate=(3, {}, cb(GradientAccumulation,'n_batches',1)),
    precision=('bf16', {}, lambda l: next((c.amp_mode.value for c in l.cbs if isinstance(c, Precision)), 'float32')),
    clip_norm=(.5, {}, cb(GradientClip,'max_norm',None)),
    mixup=(.4, {}, lambda l: next((round(float(c.distrib.concentration0),6) for c in l.cbs if isinstance(c, MixUp)),
    0.)), progressive=((.5,1.), {}, cb(ProgressiveSize,'scales',())),
    average=('swa', {}, cb(AverageWeights,'kind',None)), l2=(1e-4, {}, cb(L2Penalty,'l2',0.)),
    patience=(2, {}, cb(EarlyStoppingCallback,'patience',None)),
    plateau_patience=(4, dict(schedule='flat'), cb(ReduceLROnPlateau,'patience',None)),
    plateau_factor=(3., dict(schedule='flat'), cb(ReduceLROnPlateau,'factor',None)),
    step_epoch=(5, dict(schedule='steps'), cb(StepRate,'at',None)),
    step_factor=(4., dict(schedule='steps'), cb(StepRate,'factor',None)),
    loss=('focal', {}, lambda l: 'focal' if 'Focal' in type(l.loss_func).__name__ else 'bce'),
    focal_gamma=(3., dict(loss='focal'), lambda l: l.loss_func.gamma),
    class_weights=('balanced', {}, lambda l: 'balanced' if getattr(l.loss_func, 'pos_weight', None) is not None
    else None), wd=(.1, {}, lambda l: l.opt.hypers[0]['wd']),
    lr=(1e-3, dict(schedule='flat'), lambda l: max(l.recorder.lrs)), epochs=(2, {}, lambda l: l.n_epoch),
    schedule=('flat', {}, lambda l: 'flat' if len(set(l.recorder.lrs))==1 else 'other'))
PREPARE = dict(size=(8,24,24), margin=5., clip=(1.,99.), min_overlap=.3)
SLICEWISE = dict(slice_order='position', slice_pick='largest', wrap_start=True, voi_lut=True, black_slices='keep',
    crop_by='none', range_by='patient', short_series='zeros', fill_seed=3, transpose=False, box_of='raw')
AT_PREDICTION = {'tta_flip','tta_shift'} # used when predicting, by the recipe that is given there
UNUSED = {'cutout','equalize_over','other_tfms','published_alarm','prepare_by','crop_after_contrast',
    'pretrained'} # tried below, or of the leakage audit


def learner(store, path, recipe, fit=True, n_folds=3, **kwargs):
    learn = mgmt_learner(recipe_dls(store, recipe, n_folds=n_folds, **kwargs), recipe=recipe, path=path)
    if fit:
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    return learn


def trained(store, path, *args, **kwargs):
    learn = learner(store, path, *args, **kwargs)
    return learn, load_model(save_model(learn, Path(path)/'model')).recipe


def written(learn):
    "The recipe of a learner's model, as a file holds it"
    return Recipe.from_json(json.loads(json.dumps(as_model(learn).recipe.to_json())))


def test_every_choice_is_tried_here():
    tried = {*AUGMENT, *TRAIN, *PREPARE, *SLICEWISE, *AT_PREDICTION, *UNUSED}
    assert tried==set(choice_names('prepare','loader','augment','backbones','learner','leakage'))


def test_each_choice_of_training_is_recorded_as_the_object_had_it(stores, tmp_path, capsys):
    rows = []
    for k,(value,more,read) in TRAIN.items():
        learn = learner(stores['default'], tmp_path/k, tiny(**{**more, k:value}),
            fit=k in ('wd','lr','epochs','schedule'))
        said = written(learn)
        rows.append((k, read(learn), said[k]))
        want = pytest.approx(value) if isinstance(value, float) else value
        assert read(learn)==want and said[k]==want, rows[-1]
    for k,(part,name,value) in AUGMENT.items():
        learn = mgmt_learner(recipe_dls(stores['default'], tiny(**{k:value}), n_folds=3), path=tmp_path/'aug')
        said = written(learn)
        rows.append((f'{k} ({part}.{name})', aug(part,name)(learn), said[k]))
        assert aug(part,name)(learn)==said[k]==value, rows[-1]
    with capsys.disabled(): print('\n'+pd.DataFrame(rows, columns=['choice','ran','recorded']).to_string(index=False))


@pytest.mark.parametrize('k', [*PREPARE, *SLICEWISE])
def test_each_choice_of_preparation_is_recorded_as_the_store_had_it(cohort, tmp_path, k):
    name,value = ('default',PREPARE[k]) if k in PREPARE else ('published',SLICEWISE[k])
    few = cohort.groupby('label').head(3)
    store = prepare(few, tmp_path/'store', 'FLAIR,T1wCE', recipe=tiny(name, **{k:value}), n_workers=1,
        progress=False)
    assert VolumeStore(store.path).recipe[k]==value
    learn = mgmt_learner(mgmt_dls(store, bs=4, n_folds=3),
        recipe=tiny(name, **({k:value} if k=='size' else {'size':store.size})), path=tmp_path)
    assert written(learn)[k]==value


@pytest.mark.parametrize('name', ['default','published','winner'])
def test_a_recipe_through_every_door(stores, tmp_path, name):
    """Library, command, sweep, cross-validation and out-of-fold predictions record one recipe, but for what each of
    them sets itself."""
    store,r = stores[name],tiny(name, sequences=('T1wCE',), bs=4)
    path = save_recipe(r, tmp_path/'my.yaml')
    assert read_recipe(path)==r
    _,library = trained(store, tmp_path/'library', r)
    run = run_command('mgmt_train', store.path, tmp_path/'command', '--recipe', path)
    assert run.returncode==0, run.stderr
    swept = sweep(sweep_table([r.arch], ['T1wCE'], [0]), store.path, tmp_path/'sweep', path, n_folds=3, progress=False)
    assert not swept.error[0], swept.error[0]
    oof,models = out_of_fold(store, path, path=tmp_path/'oof', n_folds=2, progress=False)
    found = dict(command=load_model(tmp_path/'command').recipe,
        sweep=load_model(tmp_path/'sweep'/swept.folder[0]).recipe, out_of_fold=models.parts['fold0'].recipe)
    own = dict(out_of_fold={'patience':None, 'plateau_patience':None}) # it watches nobody, and takes the last epoch
    for door,other in found.items(): assert other.values()=={**library.values(), **own.get(door, {})}, door
    for door in ('library','command',f'sweep/{swept.folder[0]}'):
        again = read_recipe(tmp_path/door/'recipe.yaml')
        assert {k:v for k,v in again.values().items() if k!='freeze'}=={k:v for k,v in library.values().items()
            if k!='freeze'}, door


def test_cross_validation_records_the_augmentation_it_was_given(cohort, stores, tmp_path):
    many = pd.concat([cohort.assign(patient=cohort.patient+s) for s in 'ab'], ignore_index=True)
    store = prepare(many, tmp_path/'store', 'T1wCE', recipe=tiny(), n_workers=2, progress=False)
    cross_validate(store, tmp_path/'cv', recipe=tiny(bs=4), n_folds=2, inner=2, augment=get_recipe('none', rotation=5.),
        progress=False)
    for p in (tmp_path/'cv/runs').iterdir():
        r = load_model(p).recipe
        assert (r.rotation, r.noise_p, r.bs)==(5., 0., 4)


def test_what_is_done_by_hand_is_recorded(stores, tmp_path):
    learn = mgmt_learner(mgmt_dls(stores['default'], bs=4, n_folds=3), recipe=tiny(), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        learn.fit(2, 2e-2)
    r = as_model(learn).recipe
    assert (r.epochs, r.lr, r.schedule, r.bs, r.rotation, r.flip)==(3, 2e-2, 'flat', 4, 0., '')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    r = as_model(learn).recipe
    assert (r.epochs, r.schedule)==(4, 'own') and r.lr==pytest.approx(1e-3, rel=.05)
    own = mgmt_learner(mgmt_dls(stores['default'], bs=4, n_folds=3, augs=[RandAffine(rotation=30.), lambda x: x]),
        recipe=tiny(), path=tmp_path)
    r = as_model(own).recipe
    assert (r.rotation, len(r.other_tfms))==(30., 1)


def test_what_a_training_was_given_is_recorded(stores, tmp_path):
    def recorded(**given):
        learn = mgmt_learner(mgmt_dls(stores['default'], bs=4, n_folds=3), recipe=tiny(), path=tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, **given)
        return load_model(save_model(learn, tmp_path/'m')).recipe
    assert recorded(lr=1e-3, wd=.3).wd==.3
    assert recorded(lr=slice(1e-5,1e-3)).lr==1e-3
    by_callbacks = recorded(lr=1e-3, cbs=[GradientAccumulation(n_batches=2), GradientClip(.5)])
    assert (by_callbacks.accumulate, by_callbacks.clip_norm)==(2, .5)


def test_trainings_one_after_the_other_are_recorded_as_the_whole(stores, tmp_path):
    learn,once = trained(stores['default'], tmp_path, tiny())
    for resume in (False,True): # what is resumed was done: nothing is added
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe(resume)
        assert as_model(learn).recipe.epochs==2*once.epochs

    tuned,_ = trained(stores['default'], tmp_path/'tuned', tiny(), fit=False)
    with tuned.no_bar(), tuned.no_logging(): tuned.fine_tune(1, 1e-3, freeze_epochs=2)
    ran = load_model(save_model(tuned, tmp_path/'tuned'/'model')).recipe
    assert (ran.epochs,ran.schedule,ran.freeze)==(3,'own','own')


@pytest.mark.parametrize('wrapped', [True,False])
def test_what_was_compiled_is_saved_resumed_and_loaded_like_any(stores, tmp_path, wrapped):
    def compiled(path):
        learn = mgmt_learner(recipe_dls(stores['default'], tiny(), n_folds=3), recipe=tiny(), path=path)
        if wrapped: learn.model = torch.compile(learn.model, backend='eager')
        else: learn.model.compile(backend='eager')
        return learn
    plain,_ = trained(stores['default'], tmp_path/'plain', tiny())
    learn = compiled(tmp_path/'compiled')
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    a,b = (load_model(save_model(o, o.path/'model')).model.state_dict() for o in (plain,learn))
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4)
    again = compiled(tmp_path/'compiled')
    with again.no_bar(), again.no_logging(): again.fit_recipe(resume=True)
    for k,v in as_model(again).model.state_dict().items(): torch.testing.assert_close(v, b[k], rtol=0, atol=0)


def test_a_crop_after_contrast_is_recorded_where_there_is_a_crop(stores, tmp_path):
    for late,share,said in ((True,.9,True), (False,.9,False)):
        r = tiny(crop_after_contrast=late, crop_resize=share)
        learn = mgmt_learner(recipe_dls(stores['default'], r, n_folds=3), recipe=r, path=tmp_path)
        found = as_model(learn).recipe
        assert (found.crop_after_contrast, found.crop_resize)==(said, share)
        assert aug('RandCropResize','crop_resize')(learn)==(share if said else 'not there')


def test_what_was_settled_earlier_is_not_asked_for_again(stores, tmp_path):
    store = stores['default']
    for r,k in ((tiny(size=(8,24,24)),'size'), (tiny(margin=9.),'margin')):
        with pytest.raises(MGMTError, match=f'{k} was settled by the store'): recipe_dls(store, r)
        with pytest.raises(MGMTError, match=f'{k} was settled by the store'):
            mgmt_learner(mgmt_dls(store, bs=8, n_folds=3), recipe=r, path=tmp_path)
    for r,k in ((tiny(shuffle=False),'shuffle'), (tiny(bs=4),'bs'), (tiny(rotation=3.),'rotation')):
        with pytest.raises(MGMTError, match=f'{k} was settled by the loaders'):
            mgmt_learner(mgmt_dls(store, bs=8, n_folds=3), recipe=r, path=tmp_path)


def test_another_recipe_on_a_store_says_what_stays(stores, tmp_path, capsys):
    learn = mgmt_learner(recipe_dls(stores['default'], tiny('published'), n_folds=3), recipe=tiny('published'),
        path=tmp_path)
    said = capsys.readouterr().out
    assert "not as recipe 'published' has them, but as settled before: by the store: prepare_by 'patient'" in said
    assert (learn.recipe.name, learn.recipe.prepare_by, learn.recipe.summed_batches)==('published','patient',1)


@pytest.mark.parametrize('bad', [dict(epochs=0), dict(bs='8'), dict(lr='abc'), dict(lr=float('nan')), dict(flip='x'),
    dict(size=(8,16)), dict(shuffle=1), dict(precision='fp64'), dict(clip_norm=-1.),
    dict(rotation=200.), dict(progressive=(2.,)), dict(epochs=1.5), dict(sequences=('T9',)), dict(outside='void')],
    ids=str)
def test_values_are_checked_when_they_are_given(bad):
    with pytest.raises(MGMTError, match=next(iter(bad))): get_recipe('default', **bad)


def test_a_bad_value_on_a_command_line_is_one_sentence(stores, tmp_path):
    run = run_command('mgmt_train', stores['default'].path, tmp_path, '--epochs', 0)
    assert run.returncode==2 and 'epochs must be a whole number from 1; received 0' in run.stderr
    assert 'Traceback' not in run.stderr


def test_a_row_that_fails_is_a_row(stores, tmp_path):
    rows = pd.DataFrame(dict(arch=['timm/test_resnet']*5+['no such']),
        dtype=object).assign(sequences=['T1wCE']*5+['FLAIR'], fold=0)
    rows['epochs'],rows['bs'],rows['lr'] = pd.Series([0,1,1,1,1,1], dtype=object),pd.Series([8,'8',8,8,4,8],
        dtype=object),pd.Series([1e-3,1e-3,'abc',float('nan'),1e-3,1e-3], dtype=object)
    res = sweep(rows, stores['default'].path, tmp_path, tiny(), n_folds=3, progress=False)
    assert [bool(e) for e in res.error]==[True,True,True,False,False,True]
    assert all(w in e for w,e in zip(('epochs','bs','lr'), res.error)) and 'no such' in res.error[5]
    assert load_model(tmp_path/res.folder[3]).recipe.lr==3e-3, "an empty cell is the recipe's own value"


def test_a_kept_row_is_of_these_patients_and_labels(cohort, tmp_path, capsys):
    go = lambda to='sweep': sweep(sweep_table(['timm/test_resnet'], ['T1wCE'], [0]), tmp_path/'store', tmp_path/to,
        tiny(), n_folds=3, progress=False)
    prepare(cohort, tmp_path/'store', 'T1wCE', recipe=tiny(), n_workers=1, progress=False)
    first = go()
    assert go().equals(first), 'the same work is not done twice'
    turned = cohort.assign(label=cohort.label.where(cohort.index>=3, 1-cohort.label))
    prepare(turned, tmp_path/'store', 'T1wCE', recipe=tiny(), n_workers=1, progress=False)
    capsys.readouterr()
    second,fresh = go(),go('elsewhere')
    assert '1 kept run in' in (said := capsys.readouterr().out) and 'other labels of 3 patients' in said
    drop = ['seconds']
    pd.testing.assert_frame_equal(second.drop(columns=drop), fresh.drop(columns=drop))


def test_a_search_is_of_these_patients(stores, cohort, tmp_path, capsys):
    def go(values, **kwargs):
        return search(dict(bs=values), kwargs.pop('store', stores['default']).path, tmp_path/'search', recipe=tiny(),
            n_folds=3, **kwargs)
    a = go([4,8], n_trials=2)
    assert len(a)==2 and (a.state=='complete').all()
    b = go([4,8,16], n_trials=3)
    assert (b.state=='complete').all() and len(b)==3, 'trials of a smaller space count in a larger one'
    pd.testing.assert_series_equal(a.valid_loss, b.valid_loss[:2])
    c = go([4,8], n_trials=1, fold=1)
    assert len(c)==1
    assert 'trials of an earlier search are not used' in (said := capsys.readouterr().out)
    assert 'patients (' in said
    with pytest.raises(MGMTError, match='bs must be'): go([0,8], n_trials=1)


def test_a_path_of_weights_is_kept_by_its_content(stores, tmp_path):
    from safetensors.torch import save_file
    import timm
    net = timm.create_model('resnet18', num_classes=0).state_dict()
    for d in 'ab': (tmp_path/d).mkdir(); save_file(net, tmp_path/d/'resnet18.safetensors')
    def key(d, r=tiny(arch='resnet18')):
        learn = mgmt_learner(recipe_dls(stores['default'], get_recipe(r, pretrained=tmp_path/d), n_folds=3),
            recipe=get_recipe(r, pretrained=tmp_path/d), path=tmp_path/'run')
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe(resume=True)
        (tmp_path/'run/checkpoint.safetensors').unlink()
        return as_model(learn).trained['key']
    assert key('a')==key('b')
    save_file({**net, 'conv1.weight':net['conv1.weight']+1e-3}, tmp_path/'b/resnet18.safetensors')
    assert key('a')!=key('b')


def test_five_doors_give_the_same_logits(cohort, stores, tmp_path, capsys):
    """One of two sequences was trained on; the box lies around both. Store, scans, bundle, external test and
    submission see the same voxels."""
    from mgmt_fast.bundle import Bundle, freeze_bundle
    from mgmt_fast.external import external_test
    from mgmt_fast.kaggle import predict_submission
    from mgmt_fast.learner import predict
    learn,_ = trained(stores['default'], tmp_path/'run', tiny(sequences=('T1wCE',)), n_folds=2)
    held = stores['default'].only(learn.dls.valid.dataset.patients)
    v = predict(tmp_path/'run', held, progress=False).merge(held.table[['patient','label']], on='patient')
    freeze_bundle(tmp_path/'run/model', v, stores['default'], tmp_path/'bundle')
    make_phantom(tmp_path/'new', n=12, test=0, auc=.9, seed=7, slices=12, size=32, sequences=('FLAIR','T1wCE'),
        progress=False)
    new = kaggle_cohort(tmp_path/'new')
    new['patient'] = 'N'+new.patient
    new = new.astype({'patient':'string'})
    store = prepare(new, tmp_path/'store', 'FLAIR,T1wCE', recipe=tiny(), n_workers=1, progress=False)
    res = external_test(tmp_path/'bundle', new, tmp_path/'external', progress=False)
    seen = dict(scans=predict(tmp_path/'run', new, n_workers=1, progress=False),
        store=predict(learn, store, progress=False),
        bundle=predict(tmp_path/'bundle', new, n_workers=1, progress=False),
        external=pd.read_csv(tmp_path/'external'/res['predictions']['file']),
        submission=predict_submission(new, [tmp_path/'bundle'], tmp_path/'submission', progress=False))
    logits = pd.DataFrame({k: np.log(p.prob/(1-p.prob)).to_numpy() for k,p in seen.items()}, index=new.patient)
    with capsys.disabled(): print('\n'+logits.head(4).to_string())
    for k in logits: np.testing.assert_allclose(logits[k], logits.scans, atol=2e-5)
    alone = prepare(new, tmp_path/'alone', 'T1wCE', recipe=tiny(), n_workers=1, progress=False)
    with pytest.raises(MGMTError, match="'sequences'.*share one box"): predict(learn, alone, progress=False)
    with pytest.raises(MGMTError, match='share one box'):
        external_test(tmp_path/'bundle', alone, tmp_path/'external', progress=False)
