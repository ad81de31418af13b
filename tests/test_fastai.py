"""fastai's own methods on our learner and loaders: each works, or refuses and says what to use instead.

`python tests/test_fastai.py` prints the table of what each did."""
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import CSVLogger, ClassificationInterpretation, DataLoaders, Learner, Transform, noop

from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError, get_recipe
from mgmt_fast.learner import mgmt_learner, predict, recipe_dls
from mgmt_fast.loader import LABELS
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import prepare
from mgmt_fast.series import read_sequence
from mgmt_fast.networks import PairLoss


def make_learner(folder, network='3d', **kwargs):
    "A learner of a few small phantoms, after one epoch"
    folder = Path(folder)
    if not (folder/'scans').exists():
        make_phantom(folder/'scans', n=14, test=0, auc=.95, seed=2, slices=8, size=32, progress=False)
    recipe = get_recipe('default', size=(8,16,16), epochs=1, bs=4, network=network, arch='timm/test_resnet',
        anisotropic=2, lr=1e-3)
    store = prepare(kaggle_cohort(folder/'scans'), folder/'store', 'T1wCE', recipe=recipe,
        n_workers=1, progress=False)
    dls = recipe_dls(store, recipe, n_folds=3)
    learn = mgmt_learner(dls, recipe=recipe, path=folder/f'run-{network}', **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    return learn


def shown(f):
    "The axes that a method drew on"
    before = plt.get_fignums()
    f()
    figures = [plt.figure(i) for i in plt.get_fignums() if i not in before]
    assert figures, 'nothing was drawn'
    axes = [a for o in figures for a in o.axes]
    for o in figures: plt.close(o)
    return axes


def titles(f): return [a.get_title() for a in shown(f)]


def each_is(words, texts):
    assert texts and all(any(o in t for o in words) for t in texts), texts
    return texts[0]


# What a method is called with: a function of the learner, which asserts and gives what is told of it.

def _predict(learn):
    p = learn.dls.valid.dataset.patients[0]
    label,decoded,prob = learn.predict(p)
    assert label==LABELS[int(decoded)] and 0<=prob<=1
    with_x = learn.predict(p, with_input=True)
    assert with_x[0].shape==(1,8,16,16)
    return f'{label}, {prob.item():.2f}'

def _get_preds(learn):
    valid,n = learn.dls.valid,len(learn.dls.valid.dataset)
    probs,y = learn.get_preds()
    x,probs2,y2,decoded,losses = learn.get_preds(with_input=True, with_decoded=True, with_loss=True)
    assert torch.equal(probs, probs2) and torch.equal(decoded, probs>.5) and len(losses)==n
    assert torch.equal(x, torch.cat([x for x,_ in valid]))
    assert learn.get_preds(ds_idx=0)[0].shape==(len(learn.dls.train.dataset),1)
    logits,_ = learn.get_preds(act=lambda o: o, reorder=False)
    assert torch.allclose(logits.sigmoid(), probs)
    unlabelled = learn.get_preds(dl=learn.dls.test_dl(valid.dataset.patients))
    assert torch.allclose(unlabelled[0], probs) and unlabelled[1] is None
    return f'{n} probabilities, labels, losses'

def _tta(learn):
    probs,y = learn.tta(n=2, beta=None)
    (augmented,plain),y = probs,y
    assert augmented.shape==plain.shape and not torch.equal(augmented, plain)
    return 'mean of augmented copies'

def _save(learn):
    file = learn.save('kept')
    before = learn.get_preds()[0]
    with torch.no_grad():
        for p in learn.model.parameters(): p.zero_()
    learn.load('kept')
    assert torch.equal(learn.get_preds()[0], before)
    return file.name

def _fit(name, *args, **kwargs):
    def _f(learn):
        getattr(learn, name)(*args, **kwargs)
        assert np.isfinite(learn.recorder.values[-1][0])
        return f'loss {learn.recorder.values[-1][0]:.2f}'
    return _f

def _lr_find(learn):
    found = learn.lr_find(num_it=12, show_plot=False)
    assert found.valley>0
    return f'valley {found.valley:.1g}'

def _freeze_to(learn):
    learn.freeze_to(-1)
    cold = [not p.requires_grad for p in learn.model.body.parameters()]
    learn.unfreeze()
    assert any(cold) and all(p.requires_grad for p in learn.model.parameters())
    return f'{sum(cold)} tensors frozen, then none'

def _freeze(learn):
    learn.freeze()
    learn.unfreeze()
    return 'as freeze_to(-1)'

def _precision(name):
    def _f(learn):
        getattr(learn, name)()
        try: return _fit('fit', 1)(learn)
        finally: learn.to_fp32()
    return _f

def _summary(learn):
    said = str(learn.summary())
    assert 'Total params' in said
    return said.splitlines()[0]

def _validate(learn):
    loss,auc,_ = learn.validate()
    return f'loss {loss:.2f}, AUC {auc:.2f}'

def _not_reduced(learn):
    with learn.loss_not_reduced():
        x,y = learn.dls.valid.one_batch()
        losses = learn.loss_func(learn.model.eval()(x), y)
    assert losses.shape==y.shape
    return f'{len(losses)} losses'

def _context(name):
    def _f(learn):
        with getattr(learn, name)(): pass
        return 'a context'
    return _f

def _added(learn):
    with learn.added_cbs(CSVLogger('extra.csv')): assert hasattr(learn, 'csv_logger')
    learn.add_cbs([CSVLogger('extra.csv')]).remove_cbs(CSVLogger)
    assert not hasattr(learn, 'csv_logger')
    return 'added and taken out'

def _refuses(name, *args, says='save_model'):
    def _f(o):
        with pytest.raises(MGMTError, match=says) as e: getattr(o, name)(*args)
        return f'refuses: {e.value}'
    return _f

def _calls(name, *args, **kwargs):
    def _f(o):
        res = getattr(o, name)(*args, **kwargs)
        return type(res).__name__
    return _f

def _montages(name, **kwargs):
    "Each panel has the label, and what is known of the prediction"
    def _f(learn):
        return each_is(LABELS, titles(lambda: getattr(learn, name)(**kwargs)))
    return _f

def _fp16(learn):
    "A half precision that this processor may lack: fastai's own error, or a training"
    learn.to_fp16()
    try: return _fit('fit', 1)(learn)
    finally: learn.to_fp32()

def _metrics(learn):
    assert [m.name for m in learn.metrics]==['auc','accuracy_multi']
    return ', '.join(m.name for m in learn.metrics)

INSIDE = lambda learn: 'called by `fit` and `get_preds`'

LEARNER = dict(
    add_cb=_added, add_cbs=_added, added_cbs=_added, remove_cb=_added, remove_cbs=_added,
    removed_cbs=lambda learn: _context('no_bar')(learn), ordered_cbs=_calls('ordered_cbs', 'after_epoch'),
    create_opt=_calls('create_opt'), fit=_fit('fit', 1, slice(1e-5,1e-3)), fit_one_cycle=_fit('fit_one_cycle', 1, 1e-3),
    fit_flat_cos=_fit('fit_flat_cos', 1, slice(1e-4)), fit_sgdr=_fit('fit_sgdr', 1, 1),
    fine_tune=_fit('fine_tune', epochs=1, freeze_epochs=1), lr_find=_lr_find, metrics=_metrics,
    freeze=_freeze, freeze_to=_freeze_to, unfreeze=_freeze, get_preds=_get_preds, predict=_predict, tta=_tta,
    validate=_validate, summary=_summary, save=_save, load=_save, show_results=_montages('show_results', max_n=2),
    show_training_loop=_calls('show_training_loop'), loss_not_reduced=_not_reduced, no_bar=_context('no_bar'),
    no_logging=_context('no_logging'), no_mbar=_context('no_mbar'), validation_context=_context('validation_context'),
    to_fp16=_fp16, to_bf16=_precision('to_bf16'), to_fp32=_calls('to_fp32'), to_contiguous=_calls('to_contiguous'),
    to_channelslast=_refuses('to_channelslast', says='channels'), export=_refuses('export', 'model.pkl'),
    to_non_native_fp16=_refuses('to_non_native_fp16', says='to_bf16'), to_non_native_fp32=_calls('to_fp32'),
    all_batches=INSIDE, one_batch=INSIDE, to_detach=INSIDE, x=INSIDE, y=INSIDE)


def _vocab(dls):
    assert list(dls.vocab)==list(LABELS) and dls.c==2 and dls.n_inp==1
    return ', '.join(dls.vocab)

def _one_batch(dls):
    x,y = dls.one_batch()
    assert x.shape==(4,1,8,16,16) and len(y)==4
    return f'{tuple(x.shape)}, {tuple(y.shape)}'

def _new(dls):
    new = dls.new(bs=2, shuffle=False)
    assert len(new.one_batch()[1])==2 and new.dataset is dls.train_ds and dls.valid.new().dataset is dls.valid_ds
    return type(new).__name__

def _test_dl(dls):
    "As many batches as asked for, without labels; with them; and any form of a patient"
    ids = dls.valid_ds.patients
    assert [len(b) for b in dls.test_dl(ids, bs=len(ids))]==[1]
    y = dls.test_dl(ids, with_labels=True, bs=len(ids)).one_batch()[1]
    assert y.tolist()==dls.valid_ds.labels.tolist()
    return 'batches of other patients'

def _moved(name, *args):
    def _f(dls):
        assert getattr(dls, name)(*args).device.type=='cpu'
        return 'on the CPU'
    return _f

def _add_tfms(dls):
    n = len(dls.valid.after_batch.fs)
    dls.add_tfms([Transform(noop)], 'after_batch', 'valid')
    assert len(dls.valid.after_batch.fs)==n+1
    return 'added'

def _sets(dls):
    both = set(dls.train_ds.patients),set(dls.valid_ds.patients)
    assert not set.intersection(*both) and dls.train.dataset is dls.train_ds and dls.valid.dataset is dls.valid_ds
    return f'{len(both[0])} and {len(both[1])} patients'

def _decode_batch(dls):
    samples = dls.decode_batch(dls.one_batch())
    return each_is(LABELS, [o[1] for o in samples])

def _show_unique(dls): return each_is(LABELS, titles(lambda: dls.show_batch(unique=True, max_n=2)))

LOADERS = dict(
    add_tfms=_add_tfms, cpu=_moved('cpu'), cuda=_moved('to', torch.device('cpu')), to=_moved('to', torch.device('cpu')),
    device=lambda dls: dls.device.type, from_dblock=_refuses('from_dblock', says='mgmt_dls'),
    from_dsets=_refuses('from_dsets', says='mgmt_dls'), new_empty=_refuses('new_empty'), test_dl=_test_dl,
    train=_sets, valid=_sets, train_ds=_sets, valid_ds=_sets, vocab=_vocab, c=_vocab, n_inp=_vocab,
    one_batch=_one_batch, new=_new, show_batch=_montages('show_batch', max_n=2), decode=_decode_batch,
    decode_batch=_decode_batch, loss_func=lambda dls: type(dls.loss_func).__name__)


def _matrix(i):
    m = i.confusion_matrix()
    y = i.dl.dataset.labels
    assert m.sum()==len(y) and m.sum(1).tolist()==[(y==0).sum(),(y==1).sum()]
    return m.tolist()

def _plot_matrix(i):
    ax, = shown(i.plot_confusion_matrix)
    assert [t.get_text() for t in ax.get_xticklabels()]==list(LABELS)
    return ax.get_title()

def _top_losses(i):
    losses,at,who = i.top_losses(2, items=True)
    assert losses[0]>=losses[1] and list(who)==[i.dl.dataset.patients[j] for j in at]
    return f'{losses[0].item():.2f}, {losses[1].item():.2f}'

def _plot_top_losses(i):
    said = titles(lambda: i.plot_top_losses(2))
    each_is(['probability'], said)
    return each_is([f'loss {i.top_losses(1)[0].item():.2f}'], said[:1])

def _most_confused(i):
    assert all({a,b}==set(LABELS) for a,b,_ in i.most_confused())
    return f'{len(i.most_confused())} pairs'

def _report(i):
    i.print_classification_report()
    return 'printed'

INTERPRETATION = dict(
    from_learner=lambda i: type(i).__name__, top_losses=_top_losses, plot_top_losses=_plot_top_losses,
    show_results=lambda i: each_is(LABELS, titles(lambda: i.show_results([0,1]))), confusion_matrix=_matrix,
    plot_confusion_matrix=_plot_matrix, most_confused=_most_confused, print_classification_report=_report)


@pytest.fixture(scope='module')
def learn(tmp_path_factory):
    learn = make_learner(tmp_path_factory.mktemp('fastai'))
    with learn.no_bar(), learn.no_logging(): yield learn


@pytest.fixture(scope='module')
def interp(learn): return ClassificationInterpretation.from_learner(learn)


def public(o): return [k for k in dir(o) if not k.startswith('_')]


def test_the_table_knows_every_public_method():
    assert not set(public(Learner))-set(LEARNER)
    assert not set(public(DataLoaders))-set(LOADERS)
    assert not set(public(ClassificationInterpretation))-set(INTERPRETATION)


@pytest.mark.parametrize('name', LEARNER)
def test_of_the_learner(name, learn): assert LEARNER[name](learn) is not None


@pytest.mark.parametrize('name', LOADERS, ids=lambda k: f'dls.{k}')
def test_of_the_loaders(name, learn): assert LOADERS[name](learn.dls) is not None


@pytest.mark.parametrize('name', INTERPRETATION)
def test_of_the_interpretation(name, interp): assert INTERPRETATION[name](interp) is not None


def test_no_look_at_the_loaders_moves_the_draws_of_augmentation(learn):
    augs = learn.dls.train.augs
    before = [t.drawn for t in augs]
    del learn.dls.train._types
    learn.dls.new()
    assert augs and [t.drawn for t in augs]==before


def test_a_patient_is_predicted_alike_in_every_form(learn):
    "By name, as a row of the cohort, as the volume that was read, as the prepared array; and as `predict` does"
    store = learn.dls.store
    p = learn.dls.valid_ds.patients[0]
    scans = kaggle_cohort(store.path.parent/'scans').set_index('patient', drop=False).loc[p]
    forms = [p, scans, read_sequence(scans, 'T1wCE'), store.read(p), torch.from_numpy(store.read(p))/255]
    probs = [learn.predict(o)[2].item() for o in forms]
    assert probs==pytest.approx([predict(learn, store.only([p]), progress=False).prob[0]]*len(forms), rel=1e-5)


def test_what_cannot_be_predicted_is_said(learn):
    for item,said in (('nobody', "no patient 'nobody'"), (np.zeros((2,8,16,16)), r'\(1, 8, 16, 16\)'),
        (dict(patient='P', T1wCE=None), 'P has no T1wCE')):
        with pytest.raises(MGMTError, match=said): learn.predict(item)


def test_a_siamese_network_is_interpreted_too(tmp_path):
    learn = make_learner(tmp_path, 'siamese')
    assert isinstance(learn.loss_func, PairLoss)
    with learn.no_bar(), learn.no_logging():
        probs,y,decoded,losses = learn.get_preds(with_decoded=True, with_loss=True)
        assert torch.equal(decoded, probs>.5) and len(losses)==len(y)
        assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum()==len(y)


def test_a_plain_learner_of_fastai_takes_the_loaders(learn):
    "The loss comes from the loaders"
    plain = Learner(learn.dls, learn.model)
    with plain.no_bar(), plain.no_logging(): plain.fit(1)
    assert np.isfinite(plain.recorder.values[-1][0])


def table(folder):
    "What each method did"
    learn,rows = make_learner(folder),[]
    with learn.no_bar(), learn.no_logging():
        interp = ClassificationInterpretation.from_learner(learn)
        for kind,o,methods in (('Learner',learn,LEARNER), ('DataLoaders',learn.dls,LOADERS),
            ('Interpretation',interp,INTERPRETATION)):
            rows += [(kind, name, f(o)) for name,f in methods.items()]
    return pd.DataFrame(rows, columns=['of','method','what it did'])


if __name__=='__main__':
    import matplotlib
    matplotlib.use('Agg')
    with tempfile.TemporaryDirectory() as d:
        print(table(d).to_string(index=False, justify='left', max_colwidth=90))
