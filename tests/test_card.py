"""Volumes that stay on a device, and the batch that a card has memory for. What needs a card is marked so; the rest
forces the same ways on a CPU, where the usual one stands beside them."""
import math
import threading

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fasttransform import Transform
from safetensors.torch import load_file

from mgmt_fast.augment import mgmt_augs
from mgmt_fast.callbacks import Checkpoint, LateFiles
from mgmt_fast.cli import mgmt_train
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError, TensorMR, get_recipe, read_recipe
from mgmt_fast.devices import tf32_on
from mgmt_fast.learner import mgmt_learner, predict, recipe_dls
from mgmt_fast.loader import mgmt_dls
from mgmt_fast.memory import auto_batch, training_bytes
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import prepare

RECIPE = get_recipe('default', arch='timm/test_resnet', epochs=3, lr=1e-3, bs=4)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    d = tmp_path_factory.mktemp('card')
    make_phantom(d/'cohort', n=23, test=0, auc=.9, seed=1, slices=16, size=64, progress=False)
    return prepare(kaggle_cohort(d/'cohort'), d/'store', 'FLAIR,T1wCE', size=(8,32,32), progress=False)


def batches(dls, epochs=2):
    "Everything that two epochs of both loaders give"
    return [b for _ in range(epochs) for dl in dls for b in dl]


def same(a, b):
    assert len(a)==len(b)
    for (x,y),(kx,ky) in zip(a, b):
        assert type(x) is type(kx) is TensorMR and x.dtype==kx.dtype and y.dtype==ky.dtype
        assert torch.equal(x.cpu(), kx.cpu()) and torch.equal(y.cpu(), ky.cpu())


def loaders(store, **kwargs):
    return mgmt_dls(store, **{**dict(bs=4, seed=5, augs=mgmt_augs('default', seed=5)), **kwargs})


HOW = dict(plain={}, workers=dict(num_workers=2), drop=dict(drop_last=True), alone=dict(bs=1),
    one=dict(sequences='T1wCE'), turned=dict(sequences=['T1wCE','FLAIR']), whole=dict(bs=100),
    in_order=dict(shuffle=False))


@pytest.mark.parametrize('how', HOW)
def test_kept_volumes_give_the_same_batches(store, how):
    usual = loaders(store, kept=False, device='cpu', **{k:v for k,v in HOW[how].items() if k!='num_workers'})
    kept = loaders(store, kept=True, device='cpu', **HOW[how])
    same(batches(usual), batches(kept))
    assert [dl.at_hand for dl in usual]==['','']
    assert [dl.at_hand for dl in kept]==['kept','kept'] and kept.train.kept is kept.valid.kept
    volumes = kept.train.kept
    assert f'kept on cpu, {volumes.there.sum()} patients' in kept.where and 'read from the store' in usual.where


def test_volumes_that_are_read_ahead_give_the_same_batches(store, monkeypatch):
    usual,ahead = loaders(store, device='cpu'),loaders(store, device='cpu')
    monkeypatch.setattr(type(ahead.train), '_source', lambda self: 'ahead' if self.kept is ahead.train.kept else '')
    same(batches(usual), batches(ahead))
    assert ahead.train.kept.held is None


@pytest.mark.parametrize('world', [2,3,5])
def test_processes_share_kept_batches(store, world):
    for rank in range(world):
        pair = loaders(store, device='cpu'),loaders(store, kept=True, device='cpu')
        for dls in pair: dls.train.rank,dls.train.world = rank,world
        same(*([b for _ in range(2) for b in dls.train] for dls in pair))


def test_a_batch_looked_at_costs_no_draw_and_reads_no_more_than_itself(store):
    usual,kept = loaders(store, device='cpu'),loaders(store, kept=True, device='cpu')
    same([usual.train.one_batch()], [kept.train.one_batch()])
    assert kept.train.kept.there.sum()==4
    kept.show_batch(max_n=1)
    usual.show_batch(max_n=1)
    same(batches(usual), batches(kept))


def test_what_changes_single_samples_goes_through_the_data_set(store):
    double = Transform(lambda x: x*2 if isinstance(x, TensorMR) else x)
    pair = loaders(store, augs=None, device='cpu'),loaders(store, augs=None, kept=True, device='cpu')
    for dls in pair: dls.add_tfms([double], 'after_item', 'train')
    same(*map(batches, pair))
    assert [dl.at_hand for dl in pair[1]]==['','kept']
    other = pair[1].test_dl(store.table.patient[:3], with_labels=True)
    assert len(list(other))==1 and not other.at_hand
    whole = pair[1].valid.new(create_batch=lambda samples: samples)
    assert len(next(iter(whole)))==4 and not whole.at_hand


def test_patients_without_a_label_stay_so(store):
    dls = loaders(store, kept=True, device='cpu')
    data = dls.valid.dataset
    data.labels = np.where(np.arange(len(data))==1, np.nan, data.labels).astype(np.float32)
    (x,y), = dls.valid.new(bs=100)
    assert y.isnan().tolist()==[i==1 for i in range(len(data))]


def trained(store, path, resume=False, stop=None, cbs=(), **kwargs):
    class Stop(Callback):
        order = Checkpoint.order+1
        def after_epoch(self):
            if self.epoch==stop: raise CancelFitException
    dls = recipe_dls(store, RECIPE, seed=2, **kwargs)
    learn = mgmt_learner(dls, recipe=RECIPE, path=path, cbs=[Stop(), *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(resume=resume)
    return learn


def same_weights(a, b):
    for (k,v),w in zip(a.model.state_dict().items(), b.model.state_dict().values()): assert torch.equal(v, w), k


def test_a_training_of_kept_volumes_is_the_same_training_resumed_or_not(store, tmp_path):
    usual,kept = trained(store, tmp_path/'a', device='cpu'),trained(store, tmp_path/'b', kept=True, device='cpu')
    same_weights(usual, kept)
    assert all(torch.equal(p, q) for p,q in zip(usual.get_preds(), kept.get_preds()))
    trained(store, tmp_path/'c', resume=True, stop=0, kept=True, device='cpu')
    same_weights(trained(store, tmp_path/'c', resume=True, device='cpu'), usual)
    trained(store, tmp_path/'d', resume=True, stop=0, device='cpu')
    same_weights(trained(store, tmp_path/'d', resume=True, kept=True, device='cpu'), usual)
    torch.manual_seed(0)
    a = usual.tta(n=2)
    torch.manual_seed(0)
    assert all(torch.equal(p, q) for p,q in zip(a, kept.tta(n=2)))


def test_what_does_not_fit_is_said(store, monkeypatch):
    monkeypatch.setattr('mgmt_fast.loader.free_bytes', lambda device: 1e5)
    with pytest.raises(MGMTError, match="do not fit into the 0.0 GB of cpu.*kept='auto'"):
        loaders(store, kept=True, device='cpu').one_batch()
    with pytest.raises(MGMTError, match="'auto', True or False"): loaders(store, kept='yes')


@pytest.mark.cuda
def test_a_card_keeps_what_fits_and_reads_the_rest_ahead(store, monkeypatch):
    kept = loaders(store, device='cuda', augs=None)
    usual = batches(loaders(store, device='cuda', augs=None, kept=False))
    same(usual, batches(kept))
    assert kept.train.at_hand=='kept' and 'kept on cuda' in kept.where
    monkeypatch.setattr('mgmt_fast.loader.free_bytes', lambda device: 1e5)
    ahead = loaders(store, device='cuda', augs=None)
    same(usual, batches(ahead))
    assert ahead.train.at_hand=='ahead' and 'read from the store in every epoch' in ahead.where


@pytest.mark.cuda
def test_batches_of_a_card_wait_for_nothing(store):
    dls = loaders(store, device='cuda', kept=True)
    batches(dls, 1)
    torch.cuda.set_sync_debug_mode('error') # any wait raises
    try: n = len(batches(dls, 1))
    finally: torch.cuda.set_sync_debug_mode('default')
    assert n==len(dls.train)+len(dls.valid)


@pytest.mark.cuda
def test_a_training_on_a_card_is_the_same_from_kept_volumes(store, tmp_path):
    a,b = trained(store, tmp_path/'a', device='cuda', kept=False),trained(store, tmp_path/'b', device='cuda')
    assert b.dls.train.at_hand=='kept' and a.dls.train.at_hand=='ahead'
    for k,v in a.model.state_dict().items(): torch.testing.assert_close(v, b.model.state_dict()[k], atol=.02, rtol=.02)
    assert predict(b, store, progress=False).prob.notna().all()


@pytest.mark.cuda
def test_files_are_written_while_a_card_goes_on(store, tmp_path, monkeypatch):
    "By another thread, with what was there then"
    by,write = set(),LateFiles._write_copies
    def noted(*args): by.add(threading.get_ident()); write(*args)
    monkeypatch.setattr(LateFiles, '_write_copies', noted)
    class Best(Callback):
        order = Checkpoint.order+1
        def after_epoch(self):
            if self.save_best.new_best: self.now = {k: v.cpu().clone() for k,v in self.model.state_dict().items()}
    best = Best()
    trained(store, tmp_path, resume=True, cbs=(best,), device='cuda')
    assert len(by)==1 and threading.get_ident() not in by
    found = load_file(tmp_path/'best.safetensors')
    assert found.keys()==best.now.keys() and all(torch.equal(v, best.now[k]) for k,v in found.items())
    assert Checkpoint().read(tmp_path)['epoch']==2


def test_tf32_is_on_while_a_card_trains_only():
    def now(): return torch.get_float32_matmul_precision(),torch.backends.cudnn.allow_tf32
    before = now()
    with pytest.raises(KeyError), tf32_on('cuda:0'):
        assert now()==('high',True)
        raise KeyError
    assert now()==before
    with tf32_on(None): assert now()==before


@pytest.mark.cuda
def test_a_card_says_which_batch_fits(store, monkeypatch, capsys):
    need = [training_bytes(store, get_recipe(RECIPE, bs=bs), device='cuda') for bs in (1,8)]
    assert 0<need[0]<=need[1]<1e10
    found = auto_batch(store, get_recipe(RECIPE, bs=8), device='cuda')
    assert found==dict(bs=8, accumulate=1, checkpoint=False) and '8 patients per step' in capsys.readouterr().out
    monkeypatch.setattr('mgmt_fast.memory.training_bytes', lambda s, r, q, again, device: math.inf if r.bs>2 else 1.)
    assert auto_batch(store, get_recipe(RECIPE, bs=4, accumulate=2), device='cuda')==dict(bs=2, accumulate=4,
        checkpoint=False)


def test_a_command_trains_with_the_batch_that_fits_and_goes_on_with_it(store, tmp_path, monkeypatch, capsys):
    def run(found, epochs):
        monkeypatch.setattr('mgmt_fast.cli.auto_batch', lambda *_: found)
        assert mgmt_train(store.path, tmp_path, arch='resnet10', epochs=epochs, bs='auto')==0
        return read_recipe(tmp_path/'recipe.yaml')
    r = run(dict(bs=2, accumulate=4, checkpoint=True), 1)
    assert (r.bs,r.accumulate)==(2,4)
    r = run(dict(bs=1, accumulate=8, checkpoint=False), 2)
    assert (r.bs,r.accumulate,r.epochs)==(2,4,2) and 'resumed: 1 of 2' in capsys.readouterr().out


def test_without_a_card_a_command_says_so(store, tmp_path, capsys):
    if torch.cuda.is_available(): pytest.skip('a card is here')
    assert mgmt_train(store.path, tmp_path, bs='auto')==2 and 'give bs as a number' in capsys.readouterr().err


def test_without_a_card_a_number_is_asked_for(store):
    with pytest.raises(MGMTError, match='give bs as a number'): auto_batch(store, RECIPE, device='cpu')
