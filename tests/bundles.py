"A small bundle of two sequences of a phantom, for tests and for the picture of the app."
from mgmt_fast.bundle import freeze_bundle
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import get_recipe
from mgmt_fast.learner import mgmt_learner, predict, recipe_dls, save_model
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import prepare

ARCH,PAIR = 'timm/test_resnet',('FLAIR','T1wCE')


def pair_bundle(d, phantom, training, **kwargs):
    "In a folder: `scans`, their `store`, a `model` and a `bundle` of it; the folder. `kwargs` go to `freeze_bundle`"
    make_phantom(d/'scans', test=0., auc=.97, seed=1, progress=False, n_workers=0, **phantom)
    store = prepare(kaggle_cohort(d/'scans'), d/'store', PAIR, size=(16,48,48), progress=False, n_workers=0)
    r = get_recipe('default', arch=ARCH, bs=8, anisotropic=2, **training)
    dls = recipe_dls(store, r, PAIR, fold=0, n_folds=3, augs=[])
    learn = mgmt_learner(dls, recipe=r, path=d/'log', model_kwargs=dict(pretrained=False))
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    save_model(learn, d/'model')
    valid = store.only(dls.valid.dataset.patients)
    known = predict(learn, valid, progress=False).merge(store.table[['patient','label']])
    freeze_bundle(d/'model', known, store, d/'bundle', **kwargs)
    return d
