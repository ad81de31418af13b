"What one process of tests/test_distributed.py runs: a short training, its parameters and log into a file."
import json
import sys
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.losses import BCEWithLogitsLossFlat
from fastai.optimizer import Adam
from fastai.torch_core import rank_distrib
from torch import nn

from mgmt_fast.augment import mgmt_augs
from mgmt_fast.callbacks import *
from mgmt_fast.core import get_recipe
from mgmt_fast.learner import MGMTLearner
from mgmt_fast.loader import mgmt_dls
from mgmt_fast.metrics import AUC
from mgmt_fast.prepare import VolumeStore


class Net(nn.Sequential):
    arch = 'net'
    def __init__(self, norm):
        torch.manual_seed(0)
        super().__init__(nn.AvgPool3d(2), nn.Conv3d(1,4,3), nn.BatchNorm3d(4) if norm else nn.Identity(), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4,1))
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


def main(store, dest, bs, acc, norm, stop):
    torch.set_num_threads(1)
    dls = mgmt_dls(VolumeStore(store), bs=int(bs), augs=mgmt_augs(seed=1))
    model = set_norms(Net(int(norm)), 'sync')
    class Stop(Callback):
        def before_epoch(self):
            if self.epoch==int(stop): raise KeyboardInterrupt
    cbs = [HistoryLogger(), SaveBest(), StopOnNaN(), Traffic()] + ([GradientAccumulation(n_batches=int(acc))] if int(acc)>1 else [])
    learn = MGMTLearner(dls, model, loss_func=BCEWithLogitsLossFlat(), opt_func=Adam, lr=.01, wd=.1, path=Path(dest), metrics=[AUC()], cbs=cbs)
    learn.recipe,learn.seed = get_recipe('default', epochs=3, lr=.01, schedule='one_cycle'),0
    if int(stop)>=0:
        try:
            with learn.added_cbs(Stop()), learn.no_bar(), learn.no_logging(): learn.fit_recipe(resume=True)
        except KeyboardInterrupt: return
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(resume=True)
    params = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    (Path(dest)/f'rank{rank_distrib()}.json').write_text(json.dumps(dict(params=params.tolist(), values=[list(v) for v in learn.recorder.values], best=learn.save_best.best_epoch, traffic=learn.traffic.n, steps=int(learn.opt.state[next(learn.model.parameters())]['step']))))


if __name__=='__main__': main(*sys.argv[1:])
