"What one process of tests/test_distributed.py runs: short trainings, the parameters and log of each into a file."
import json
import sys
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.losses import BCEWithLogitsLossFlat
from fastai.torch_core import rank_distrib
from torch import nn

from mgmt_fast.augment import mgmt_augs
from mgmt_fast.callbacks import *
from mgmt_fast.core import get_recipe, write_json
from mgmt_fast.graphs import CapturedSteps
from mgmt_fast.learner import MGMTLearner
from mgmt_fast.loader import mgmt_dls
from mgmt_fast.metrics import AUC
from mgmt_fast.prepare import VolumeStore
from test_graphs import ByHand


class Net(nn.Sequential):
    arch = 'net'
    def __init__(self, norm):
        torch.manual_seed(0)
        super().__init__(nn.AvgPool3d(2), nn.Conv3d(1,4,3,bias=not norm), nn.BatchNorm3d(4) if norm else nn.Identity(),
            nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4,1))
    def forward(self, x): return super().forward(x.as_subclass(torch.Tensor))


class Traffic(Callback):
    "Counts the gradients' exchanges between processes"
    order = 20
    def before_fit(self):
        self.n = 0
        if not hasattr(self.model, 'register_comm_hook'): return
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        def _count(state, bucket): self.n += 1; return allreduce_hook(state, bucket)
        self.model.register_comm_hook(None, _count)


class Stop(Callback):
    def __init__(self, at): self.at = at
    def before_epoch(self):
        if self.epoch==self.at: raise KeyboardInterrupt


def train(store, dest, bs, acc=1, norm=0, stop=None, captured=False):
    "Three epochs of `bs` patients per batch and `acc` batches per step, or as many as `stop` says"
    dls = mgmt_dls(VolumeStore(store), 'T1wCE', fold=1, bs=bs, augs=mgmt_augs(seed=1))
    cbs = [HistoryLogger(), SaveBest(), StopOnNaN(),
        Traffic()] + ([GradientAccumulation(n_batches=acc)] if acc>1 else [])
    if captured: cbs += [CapturedSteps(capture=ByHand)]
    learn = MGMTLearner(dls, set_norms(Net(norm), 'sync'), loss_func=BCEWithLogitsLossFlat(), opt_func=FusedAdam,
        lr=.01, wd=.1, path=Path(dest), metrics=[AUC()], cbs=cbs)
    learn.recipe,learn.seed = get_recipe('default', epochs=3, lr=.01, schedule='one_cycle'),0
    learn.path.mkdir(exist_ok=True)
    try:
        with learn.added_cbs(Stop(stop)), learn.no_bar(), learn.no_logging(): learn.fit_recipe(resume=True)
    except KeyboardInterrupt: return
    params = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    write_json(learn.path/f'rank{rank_distrib()}.json',
        dict(params=params.tolist(), values=[list(v) for v in learn.recorder.values], best=learn.save_best.best_epoch,
        traffic=learn.traffic.n, captured=list(learn.captured_steps.report()['captured']) if captured else [],
        steps=int(learn.opt.state[next(learn.model.parameters())]['step'])))


if __name__=='__main__':
    torch.set_num_threads(1)
    for dest,kwargs in json.loads(sys.argv[2]).items(): train(sys.argv[1], dest, **kwargs)
