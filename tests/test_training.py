"""The laws of training: accumulation is the large batch, a kill costs nothing but time, and what is wrong with the
input is said."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from fastai.losses import BCEWithLogitsLossFlat
from safetensors.torch import load_file
from torch import nn

from commands import run_command
from mgmt_fast.callbacks import *
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError, get_recipe
from mgmt_fast.augment import mgmt_augs
from mgmt_fast.learner import MGMTLearner, as_model, load_model, mgmt_learner, save_model
from mgmt_fast.loader import mgmt_dls
from mgmt_fast.metrics import AUC
from mgmt_fast.recipes import SummedGradients
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import VolumeStore, prepare

BIN = Path(sys.executable).parent


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "24 patients, so that folds of 5 leave 19 or 20 to train on."
    d = tmp_path_factory.mktemp('training')
    make_phantom(d/'scans', n=24, test=0, auc=.95, seed=2, slices=8, size=32, progress=False)
    return prepare(kaggle_cohort(d/'scans'), d/'store', 'T1wCE', size=(8,16,16), n_workers=1, progress=False)


class Tiny(nn.Sequential):
    "Without batch norm; small enough for hundreds of steps a second"
    arch = 'tiny'
    def __init__(self, dropout=0.):
        torch.manual_seed(0)
        super().__init__(nn.AvgPool3d(2), nn.Conv3d(1,4,3), nn.ReLU(), nn.Dropout(dropout), nn.AdaptiveAvgPool3d(1),
            nn.Flatten(), nn.Linear(4,1))
    def forward(self, x): return super().forward(x.as_subclass(torch.Tensor))


def learner(store, path, bs=8, cbs=(), augs=True, dropout=0., epochs=3, **changes):
    dls = mgmt_dls(store, bs=bs, augs=mgmt_augs(seed=1) if augs else None)
    learn = MGMTLearner(dls, Tiny(dropout), loss_func=BCEWithLogitsLossFlat(), opt_func=FusedAdam, lr=.01, wd=.1,
        path=Path(path), metrics=[AUC()],
        cbs=[HistoryLogger(), SaveBest(), StopOnNaN(), *cbs])
    learn.recipe,learn.seed = get_recipe('default', epochs=epochs, lr=.01, arch='tiny',
        **{'schedule':'one_cycle', **changes}),0
    return learn


def fit(learn, resume=False):
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(resume=resume)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def same(a, b):
    return all(torch.equal(x,y) for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()))


def test_a_recipes_augmentation_reaches_training_and_not_validation(store):
    "Transforms of training act only where the data set says that it is training's."
    def pixels(loader, augs): return torch.cat([x for x,_ in mgmt_dls(store, bs=8, shuffle=False, augs=augs)[loader]])
    moved,still = (pixels(0, a) for a in (mgmt_augs(seed=1), None))
    assert all((a!=b).any() for a,b in zip(moved, still))
    assert torch.equal(pixels(1, mgmt_augs(seed=1)), pixels(1, None))


@pytest.mark.parametrize('schedule', ['flat','one_cycle'])
@pytest.mark.parametrize('bs,how', [(1,dict(n_batches=8)), (2,dict(n_batches=4)), (4,dict(n_batches=2)),
    (1,dict(n_samples=8)), (4,dict(n_samples=5))], ids=str)
def test_accumulation_is_the_large_batch(store, tmp_path, bs, how, schedule):
    """19 training patients: the last step has 3. Schedule, decay, clipping, augmentation, log and best weights agree
    too."""
    cbs = lambda: [GradientClip(.1), ReduceLROnPlateau(patience=1, factor=2.), EarlyStoppingCallback(patience=9)]
    whole,parts = learner(store, tmp_path/'a', cbs=cbs(), schedule=schedule),learner(store, tmp_path/'b', bs=bs,
        cbs=[*cbs(), GradientAccumulation(**how)], schedule=schedule)
    a,b = fit(whole),fit(parts)
    assert (a-b).norm()<1e-6*a.norm()
    assert whole.save_best.best_epoch==parts.save_best.best_epoch
    for v,w in zip(whole.recorder.values, parts.recorder.values):
        assert list(v[:2])==pytest.approx(list(w[:2]), rel=1e-5)


class Steps(Callback):
    "Gradient at each optimiser step, as the optimiser sees it"
    order = 90
    def before_fit(self): self.seen = []
    def before_step(self): self.seen.append(torch.cat([p.grad.flatten().clone() for p in self.model.parameters()]))


@pytest.mark.parametrize('mode', ['bf16','fp16'])
def test_accumulation_in_mixed_precision(store, tmp_path, mode):
    """The scaled and unscaled gradients of the group are those of the large batch within the type's rounding; the
    scale moves once per step."""
    runs = [learner(store, tmp_path/str(bs), bs=bs, epochs=1, augs=False, cbs=[Precision(mode), Steps(), *acc])
        for bs,acc in ((8,[]),(1,[GradientAccumulation(n_batches=8)]))]
    for r in runs: fit(r)
    a,b = (r.steps.seen for r in runs)
    assert len(a)==len(b)==3
    assert (a[0]-b[0]).norm()<.03*a[0].norm()


def test_an_overflow_drops_its_group_and_no_other(store, tmp_path):
    class Overflow(Callback):
        order = 5
        def after_loss(self):
            if self.training and self.train_iter==3: self.learn.loss_grad = self.loss_grad*float('inf')
    learn = learner(store, tmp_path, bs=1, epochs=1, augs=False,
        cbs=[Precision('fp16'), GradientAccumulation(n_batches=8), Steps(), Overflow()])
    fit(learn)
    assert len(learn.steps.seen)==2
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


def test_nothing_crosses_a_fit(store, tmp_path):
    "An interruption in the middle of a group leaves gradients; the next fit is that of a learner that never had them."
    class Stop(Callback):
        run_valid = False
        def after_batch(self):
            if self.iter==2: raise KeyboardInterrupt
    learn,clean = (learner(store, tmp_path/n, bs=1, augs=False, epochs=1, cbs=[GradientAccumulation(n_batches=8)])
        for n in 'ab')
    learn.create_opt()
    state = learn.dls.train.rng.getstate()
    with pytest.raises(KeyboardInterrupt), learn.added_cbs(Stop()): fit(learn)
    assert any(p.grad.abs().sum()>0 for p in learn.model.parameters())
    learn.dls.train.rng.setstate(state)
    assert torch.equal(fit(learn), fit(clean))


def test_lr_find_leaves_weights_log_and_gradients_alone(store, tmp_path):
    learn = learner(store, tmp_path, bs=2, epochs=1, cbs=[GradientAccumulation(n_batches=3)])
    fit(learn)
    log,w = (tmp_path/'history.csv').read_text(),[p.clone() for p in learn.model.parameters()]
    with learn.no_bar(): learn.lr_find(num_it=20, show_plot=False)
    assert all(torch.equal(a,b) for a,b in zip(w,learn.model.parameters()))
    with learn.no_bar(), learn.no_logging(): learn.validate()
    assert (tmp_path/'history.csv').read_text()==log


class Kill(Callback):
    order = 100
    def __init__(self, epoch, event): self.at,self.event = epoch,event
    def stop(self, event):
        if event==self.event and self.epoch==self.at: raise KeyboardInterrupt
    def before_epoch(self): self.stop('before_epoch')
    def after_loss(self):
        if self.training and self.iter==1: self.stop('after_loss')
    def before_validate(self): self.stop('before_validate')
    def after_epoch(self): self.stop('after_epoch')


@pytest.mark.parametrize('event', ['before_epoch','after_loss','before_validate','after_epoch'])
@pytest.mark.parametrize('kind', ['plain','all at once'])
def test_a_stopped_training_ends_where_the_undisturbed_one_does(store, tmp_path, kind, event):
    """To the bit: weights, log, losses, best epoch; with dropout, augmentation, accumulation, falling rate, averaged
    weights and a loss scale."""
    def make(path, cbs=()):
        more = [] if kind=='plain' else [GradientAccumulation(n_batches=3), AverageWeights('ema', .9),
            Precision('fp16'), ReduceLROnPlateau(patience=1), EarlyStoppingCallback(patience=2)]
        torch.manual_seed(5)
        return learner(store, tmp_path/path, bs=4, dropout=.3, epochs=4,
            schedule='one_cycle' if kind=='plain' else 'flat', cbs=[*more,*cbs])
    straight = make('a')
    fit(straight, resume=True)
    killed = make('b', [Kill(2,event)])
    with pytest.raises(KeyboardInterrupt): fit(killed, resume=True)
    torch.manual_seed(99); np.random.seed(99)
    again = make('b')
    fit(again, resume=True)
    assert same(straight, again)
    assert again.recorder.values==straight.recorder.values
    assert again.recorder.losses==straight.recorder.losses
    assert again.recorder.lrs==straight.recorder.lrs
    assert again.save_best.best_epoch==straight.save_best.best_epoch
    drop = lambda p: pd.read_csv(tmp_path/p/'history.csv').drop(columns='time')
    pd.testing.assert_frame_equal(drop('a'), drop('b'))
    done = make('b'); fit(done, resume=True)
    assert same(straight, done)


class Fails(Callback):
    def after_batch(self): raise MGMTError('the disk is full: make room')


def test_an_error_of_a_callback_is_its_own_sentence(store, tmp_path):
    with pytest.raises(MGMTError) as e: fit(learner(store, tmp_path, cbs=[Fails()]))
    assert str(e.value)=='the disk is full: make room'


def test_weights_are_averaged_over_several_epochs(store, tmp_path):
    learn = mgmt_learner(mgmt_dls(store, bs=8), 'timm/test_resnet', get_recipe('default', average='swa', epochs=5),
        path=tmp_path)
    assert torch.isfinite(fit(learn)).all() and learn.save_best.best_epoch is not None


def test_a_last_batch_of_one_patient_is_not_mixed(store, tmp_path):
    dls = mgmt_dls(store, bs=9)
    assert len(dls.train.dataset)%9==1
    learn = mgmt_learner(dls, 'timm/test_resnet', get_recipe('default', mixup=.4, epochs=1), path=tmp_path)
    assert torch.isfinite(fit(learn)).all()


def test_prototypes_are_those_of_the_averaged_weights(store, tmp_path):
    learn = mgmt_learner(mgmt_dls(store, bs=4), 'resnet10',
        get_recipe('default', network='siamese', average='ema', epochs=2, lr=1e-3), path=tmp_path)
    fit(learn)
    kept = learn.model.head.prototypes.clone()
    learn.model.eval()
    learn.prototypes.before_validate()
    torch.testing.assert_close(learn.model.head.prototypes, kept)


def beside(learn):
    "What it saves is written by another thread, as on a card"
    learn.late_files = LateFiles(always=True)
    return learn


def test_what_is_written_beside_a_training_is_what_is_written_at_once(store, tmp_path):
    a,b = learner(store, tmp_path/'a'),beside(learner(store, tmp_path/'b'))
    for o in (a,b):
        torch.manual_seed(0)
        fit(o, resume=True)
    assert same(a, b)
    for name in ('best','checkpoint'):
        then,now = (load_file(tmp_path/d/f'{name}.safetensors') for d in 'ab')
        assert then.keys()==now.keys() and all(torch.equal(v, now[k]) for k,v in then.items())


def test_an_interruption_waits_for_what_is_being_written(store, tmp_path, monkeypatch):
    "Also where `fit` takes the callback away before"
    write = Checkpoint._write_state
    def slow(*args): time.sleep(.5); write(*args)
    monkeypatch.setattr(Checkpoint, '_write_state', slow)
    learn = beside(learner(store, tmp_path))
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging():
        learn.fit(3, cbs=[Checkpoint(), Kill(1,'after_epoch')])
    assert Checkpoint().read(tmp_path)['epoch']==1 and learn.late_files.pool is None


def test_no_checkpoint_speaks_of_weights_that_were_not_written(store, tmp_path, monkeypatch):
    def full(self, path, weights): raise MGMTError('the disk is full')
    monkeypatch.setattr(SaveBest, '_write_best', full)
    with pytest.raises(MGMTError, match='^the disk is full'): fit(beside(learner(store, tmp_path)), resume=True)
    assert not list(tmp_path.glob('*.safetensors'))


def test_a_checkpoint_of_another_training_is_refused(store, tmp_path):
    fit(learner(store, tmp_path, epochs=1), resume=True)
    for change,word in ((dict(schedule='flat'),"'schedule'"), (dict(bs=4),"'bs'")):
        with pytest.raises(TrainingError, match=word):
            fit(learner(store, tmp_path, **{'epochs':1, **change}), resume=True)
    js = store.path/'store.json'
    old = js.read_text()
    js.write_text(old.replace('"hash": "', '"hash": "0', 1))
    try:
        with pytest.raises(TrainingError, match='store has changed'):
            fit(learner(VolumeStore(store.path), tmp_path, epochs=1), resume=True)
    finally: js.write_text(old)
    (tmp_path/'checkpoint.safetensors').write_bytes(b'cut off')
    with pytest.raises(TrainingError, match='damaged'): fit(learner(store, tmp_path, epochs=1), resume=True)


def test_a_limit_of_epochs_can_be_raised(store, tmp_path, capsys):
    """Under a flat rate it is the training that had the higher limit from the start; a lower one than what is done is
    refused."""
    straight = learner(store, tmp_path/'a', epochs=3, schedule='flat'); fit(straight, resume=True)
    fit(learner(store, tmp_path/'b', epochs=2, schedule='flat'), resume=True)
    raised = learner(store, tmp_path/'b', epochs=3, schedule='flat'); fit(raised, resume=True)
    assert 'resumed: 2 of 3 epochs are done (the limit was 2)' in capsys.readouterr().out
    assert same(straight, raised) and straight.recorder.values==raised.recorder.values
    with pytest.raises(TrainingError, match="'epochs': 3 are done there, 2 asked for now"):
        fit(learner(store, tmp_path/'b', epochs=2, schedule='flat'), resume=True)


@pytest.mark.parametrize('n', [2,3])
def test_summed_gradients_are_resumed_with_what_was_carried_over(store, tmp_path, n):
    "Five batches per epoch, so that groups of two and three cross into the next one."
    make = lambda d, cbs=(): learner(store, tmp_path/d, bs=4, cbs=[SummedGradients(n), *cbs], schedule='flat', epochs=3)
    straight = make('a'); fit(straight, resume=True)
    with pytest.raises(KeyboardInterrupt): fit(make('b', [Kill(1,'after_loss')]), resume=True)
    again = make('b'); fit(again, resume=True)
    assert len(again.dls.train)%n and same(straight, again) and straight.recorder.losses==again.recorder.losses


def test_a_fit_begins_from_a_clean_state_whatever_was_interrupted(store, tmp_path):
    class Stop(Callback):
        order = 70
        def after_batch(self):
            if self.iter==2: raise KeyboardInterrupt
    def run(d, interrupt):
        learn = mgmt_learner(mgmt_dls(store, bs=4), 'resnet10', get_recipe('default', epochs=2, lr=1e-3, average='ema'),
            path=tmp_path/d)
        if interrupt:
            before = {k:v.clone() for k,v in learn.model.state_dict().items()}
            state = learn.dls.train.rng.getstate()
            with pytest.raises(KeyboardInterrupt), learn.added_cbs(Stop()), learn.no_bar():
                learn.lr_find(num_it=20, show_plot=False)
            with pytest.raises(KeyboardInterrupt), learn.added_cbs(Stop()), learn.no_bar(): learn.get_preds(ds_idx=0)
            kept = [torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()]
            assert all(kept), 'the weights are as before the search'
            learn.dls.train.rng.setstate(state)
        fit(learn)
        return learn
    a,b = run('a', False),run('b', True)
    assert same(a, b)
    assert len(pd.read_csv(tmp_path/'b/history.csv'))==2
    assert (tmp_path/'b/best.safetensors').exists()
    assert b.save_best.best_epoch==a.save_best.best_epoch


def test_freezing_means_what_fastai_users_expect(store, tmp_path):
    def make(**changes):
        return mgmt_learner(mgmt_dls(store, bs=8), 'resnet10', get_recipe('default', epochs=1, **changes),
            path=tmp_path)
    def moved(learn, f):
        w = {n: p.clone() for n,p in learn.model.named_parameters()}
        with learn.no_bar(), learn.no_logging(): f()
        return {n for n,p in learn.model.named_parameters() if not torch.equal(p, w[n])}
    learn = make()
    assert [len(o) for o in (learn.splitter(learn.model))]==[sum(
        1 for n,_ in learn.model.named_parameters() if not n.startswith('head')), 2]
    learn.freeze()
    assert all(n.startswith('head') or 'bn' in n or 'norm' in n or 'downsample.1' in n
        for n in moved(learn, lambda: learn.fit(1, 1e-2)))
    assert 'by hand' in as_model(learn).recipe.freeze
    learn.unfreeze()
    assert len(moved(learn, lambda: learn.fit(1, 1e-2)))>.9*len(list(learn.model.parameters()))
    assert as_model(learn).recipe.freeze=='own' # first the head, then all
    frozen = make(freeze='all')
    assert moved(frozen, lambda: frozen.fit(1, 1e-2))=={'head.fc.weight','head.fc.bias'}
    frozen.fit(1, slice(1e-4,1e-2))
    assert [h['lr'] for h in frozen.opt.hypers]==pytest.approx([1e-4,1e-2])
    with frozen.no_bar(), frozen.no_logging(): frozen.fine_tune(1, 1e-3)
    assert all(p.requires_grad for p in frozen.model.parameters())


@pytest.mark.parametrize('epoch', [0,1])
def test_a_loss_that_is_not_finite_names_the_patients_and_keeps_good_weights(store, tmp_path, epoch):
    class Spoil(Callback):
        order = 1
        def after_pred(self):
            if self.training and self.epoch==epoch and self.iter==1:
                self.learn.pred = self.pred*float('nan')
                self.who = self.dl.batch_patients(1)
    learn = learner(store, tmp_path, cbs=[Spoil()])
    with pytest.raises(TrainingError, match='nan') as e: fit(learn)
    assert len(learn.spoil.who)==8 and all(p in str(e.value) for p in learn.spoil.who)
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
    if epoch:
        best = load_file(tmp_path/'best.safetensors')
        assert all(torch.equal(best[k],v) for k,v in learn.model.state_dict().items())


def test_out_of_memory_says_what_to_change(store, tmp_path):
    class Full(Callback):
        def after_pred(self): raise torch.OutOfMemoryError('CUDA out of memory')
    with pytest.raises(TrainingError, match='8x1x8x16x16.*accumulate=2.*checkpoint=True'):
        fit(learner(store, tmp_path, cbs=[Full()]))


def test_one_class_or_nobody_to_train_on(store, tmp_path):
    dls = mgmt_dls(store)
    data = dls.train.dataset
    data.labels = np.ones_like(data.labels)
    with pytest.raises(TrainingError, match='both classes'): mgmt_learner(dls, 'resnet10', path=tmp_path)
    data.labels,data.patients = data.labels[:0],[]
    with pytest.raises(TrainingError, match='empty'): mgmt_learner(dls, 'resnet10', path=tmp_path)
    with pytest.raises(MGMTError, match='each fold needs'):
        mgmt_dls(store, patients=store.table.patient[store.table.label==1])


@pytest.mark.parametrize('how', [dict(n_batches=0), dict(n_samples=-1), dict(n_batches=1.5), dict(),
    dict(n_batches=2,n_samples=2)], ids=str)
def test_accumulation_refuses_nonsense(how):
    with pytest.raises(MGMTError): GradientAccumulation(**how)


@pytest.mark.parametrize('kind', ['frozen','group'])
def test_norms_train_save_and_load(store, tmp_path, kind):
    "Frozen statistics do not move; group norm knows no batch, so a patient's logit is its own in training too."
    dls = mgmt_dls(store, bs=8)
    learn = mgmt_learner(dls, 'resnet10', get_recipe(
        'default', norms=kind, epochs=1, lr=1e-3, accumulate=2, progressive=(.5,), mixup=.2, class_weights='balanced',
        loss='focal'), path=tmp_path)
    stats = {k:v.clone() for k,v in learn.model.state_dict().items() if 'running' in k}
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in stats.items())
    assert bool(stats)==(kind=='frozen')
    x = dls.one_batch()[0].float()[:2].as_subclass(torch.Tensor)
    with torch.no_grad():
        learn.model.train()
        assert torch.allclose(learn.model(x)[:1], learn.model(x[:1]), atol=1e-5)
        save_model(learn, tmp_path/'model')
        assert torch.equal(load_model(tmp_path/'model').model.eval()(x), learn.model.eval()(x))


def test_a_killed_command_goes_on_by_itself(store, tmp_path):
    "SIGKILL after the first epoch is on disk; the same command again ends in the bits of an undisturbed one."
    def args(d): return store.path,tmp_path/d,'--arch','resnet10','--epochs','3','--bs','8'
    assert run_command('mgmt_train', *args('straight')).returncode==0
    p = subprocess.Popen([BIN/'mgmt_train', *args('killed')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path/'killed/checkpoint.safetensors').exists():
        assert p.poll() is None
        time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (tmp_path/'killed/model.json').exists()
    r = run_command('mgmt_train', *args('killed'))
    assert r.returncode==0 and 'resumed: ' in r.stdout, r.stdout+r.stderr
    a,b = (load_file(tmp_path/d/'model.safetensors') for d in ('straight','killed'))
    assert all(torch.equal(v,b[k]) for k,v in a.items())
    r = run_command('mgmt_train', *args('killed'), '--lr', .1)
    assert r.returncode==2 and "'lr'" in r.stderr and 'Traceback' not in r.stderr
