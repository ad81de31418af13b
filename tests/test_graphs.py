"""Training steps as CUDA graphs: the same training as without, whatever else takes part in it.

The laws are checked twice: with a stand-in that follows a graph's rules on a CPU (what goes in, comes out and is
handed back lies in memory that stays and is written over), and, marked `cuda`, with real graphs."""
import os

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8') # before torch asks for a card: it repeats itself then

import random

import numpy as np
import pytest
import torch
from fastai.basics import DataLoaders, Learner
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from timm.layers import DropPath
from torch import nn

from mgmt_fast.augment import mgmt_augs
from mgmt_fast.callbacks import *
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError, get_recipe
from mgmt_fast.graphs import *
from mgmt_fast.learner import mgmt_learner, recipe_that_ran, training_key
from mgmt_fast.loader import mgmt_dls
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import prepare


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "24 patients: batches of 4 leave a last, smaller one."
    d = tmp_path_factory.mktemp('graphs')
    make_phantom(d/'scans', n=24, test=0, auc=.95, seed=2, slices=16, size=40, progress=False)
    return prepare(kaggle_cohort(d/'scans'), d/'store', 'T1wCE', size=(16,32,32), n_workers=1, progress=False)


class ByHand(StepGraph):
    "Follows the rules of a graph, and computes on any device"
    def __init__(self, model, x, memory):
        self.memory,self.kind,self.model = memory,type(x),model
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.x,self.out,self.grads = torch.empty_like(x.as_subclass(torch.Tensor)).copy_(x),None,None
        self.graphs = Played(self._play_forward),Played(self._play_backward)

    def _play_forward(self):
        with torch.enable_grad(), own_leaves(self.model) as leaves:
            self.leaves,self.live = [leaves[p] for p in self.params],self._forward(self.model)
        out = self.live.detach().as_subclass(torch.Tensor)
        if self.out is None: self.kind,self.out,self.g = type(self.live),out.clone(),torch.zeros_like(out)
        self.out.copy_(out)

    def _play_backward(self):
        with torch.enable_grad(): grads = self._backward(self.live)
        if self.grads is None: self.grads = [None if g is None else g.clone() for g in grads]
        for old,new in zip(self.grads, grads):
            if new is not None: old.copy_(new)


class Played:
    def __init__(self, f): self.replay = f


HOW = dict(off=None, hand=ByHand, card=StepGraph)


NET = 'resnet10' if torch.cuda.is_available() else 'timm/test_resnet'


def train(store, path, how, arch=NET, epochs=2, bs=4, augs=False, resume=False, cbs=(), model_kwargs=None,
    **changes):
    "A learner that was trained by a recipe, with what its callback said"
    dls = mgmt_dls(store, bs=bs, augs=mgmt_augs(seed=1) if augs else None)
    steps = [] if how=='off' else [CapturedSteps(capture=None if how=='card' else HOW[how])]
    recipe = get_recipe('default', epochs=epochs, lr=1e-3, **changes)
    learn = mgmt_learner(dls, arch, recipe, path=path, cbs=[*cbs,*steps], graphs=False, model_kwargs=model_kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(resume=resume)
    return learn


def results(learn):
    "Losses of the steps, logged values and tensors of a training"
    state = {k:v.detach().cpu().float() for k,v in learn.model.state_dict().items()}
    losses = torch.tensor([float(o) for o in learn.recorder.losses])
    values = torch.tensor([[float(o) for o in v if o is not None] for v in learn.recorder.values])
    return dict(losses=losses, values=values, **state)


def apart(a, b): return max(float((a[k]-b[k]).norm()/(b[k].norm()+1e-6)) for k in b)
def equal(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in b)
def captured(learn): return list(learn.captured_steps.report()['captured'])


LAWS = dict(plain={}, accumulated=dict(accumulate=2), clipped=dict(clip_norm=.05), ema=dict(average='ema'),
    swa=dict(average='swa'), frozen=dict(freeze='all'), frozen_norms=dict(norms='frozen'), group=dict(norms='group'),
    l2=dict(l2=1e-2), dropout=dict(head='published'), progressive=dict(progressive=(.5,1.)), focal=dict(loss='focal'),
    mixup=dict(mixup=.4), summed=dict(summed_batches=2), siamese=dict(network='siamese'), augmented=dict(augs=True),
    several=dict(accumulate=2, clip_norm=.05, average='ema', l2=1e-2, head='published'))


# The stand-in, on a CPU

@pytest.mark.parametrize('law', LAWS)
def test_a_captured_training_is_the_same_training(store, tmp_path, law):
    a,b = (train(store, tmp_path/o, o, **LAWS[law]) for o in ('hand','off'))
    assert equal(results(a), results(b))
    assert captured(a) and not hasattr(b, 'captured_steps')


def test_recomputing_is_the_same_training(store, tmp_path):
    a,b = (train(store, tmp_path/o, o, model_kwargs=dict(checkpoint=True)) for o in ('hand','off'))
    assert equal(results(a), results(b)) and captured(a)


class Killed(Callback):
    def before_epoch(self):
        if self.epoch==1: raise KeyboardInterrupt


def resumed(store, path, how):
    with pytest.raises(KeyboardInterrupt): train(store, path, how, resume=True, cbs=[Killed()], head='published')
    return train(store, path, how, resume=True, head='published')


def test_a_resumed_training_is_the_same_training(store, tmp_path):
    straight = results(train(store, tmp_path/'straight', 'off', head='published'))
    assert equal(results(resumed(store, tmp_path/'resumed', 'hand')), straight)


def test_freezing_and_unfreezing_need_other_graphs(store, tmp_path):
    def fine_tuned(how):
        learn = train(store, tmp_path/how, how, epochs=1)
        with learn.no_bar(), learn.no_logging():
            learn.freeze(); learn.fit(1); learn.unfreeze(); learn.fit(1)
        return learn
    a,b = map(fine_tuned, ('hand','off'))
    assert equal(results(a), results(b)) and captured(a)


def test_weights_that_moved_need_another_graph(store, tmp_path):
    class Move(Callback):
        def before_epoch(self):
            for p in self.model.parameters(): p.data = p.data.clone()
    made = []
    def make(*args):
        made.append(ByHand(*args))
        return made[-1]
    dls = mgmt_dls(store, bs=4)
    learn = mgmt_learner(dls, 'resnet10', path=tmp_path, cbs=[CapturedSteps(capture=make),Move()], graphs=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    assert len([o for o in made if len(o.x)==4])==3 # and one for the last batch of the third epoch


def small(*cbs, n=40, sizes=(8,), seed=0, loss=nn.MSELoss()):
    "A learner of a small network; batches have these sizes, over and over"
    class Sizes(Callback):
        order,run_valid = -5,False
        def before_batch(self):
            k = sizes[self.iter%len(sizes)]
            self.learn.xb,self.learn.yb = (self.x[:k],),(self.y[:k],)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3,4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(.3), nn.Linear(4,1))
    ds = [(torch.rand(3), torch.rand(1)) for _ in range(n)]
    dls = DataLoaders.from_dsets(ds, ds, bs=8, shuffle=False, drop_last=False, device=torch.device('cpu'))
    return Learner(dls, net, loss_func=loss, cbs=[Sizes(),*cbs])


def fit(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn


@pytest.mark.parametrize('seed', range(8))
def test_a_shape_is_captured_when_it_comes_again(seed):
    rng = random.Random(seed)
    sizes = [rng.randint(2,8) for _ in range(rng.randint(3,20))]
    learn = fit(small(CapturedSteps(capture=ByHand), n=8*len(sizes), sizes=sizes))
    again = [k for i,k in enumerate(sizes) if k in sizes[:i]]
    want = list(dict.fromkeys(again))[:4]
    assert captured(learn)==[f'{k}x3' for k in want]
    used = sum(sizes.count(k)-1 for k in want)
    assert sum(learn.captured_steps.report()['eager'].values())==len(sizes)-used
    assert equal(results(learn), results(fit(small(n=8*len(sizes), sizes=sizes))))


def test_shapes_of_earlier_epochs_make_room():
    "Five sizes, one in each epoch"
    class ByEpoch(Callback):
        order,run_valid = -4,False
        def before_batch(self): self.learn.xb,self.learn.yb = (self.x[:8-self.epoch],),(self.y[:8-self.epoch],)
    learn = fit(small(CapturedSteps(capture=ByHand), ByEpoch()), 6)
    assert captured(learn)==[f'{8-e}x3' for e in range(6)]


def test_a_stopped_batch_leaves_the_model_alone(capsys):
    class Stop(Callback):
        order = CapturedSteps.order+1
        def before_batch(self):
            if self.iter==2: raise KeyboardInterrupt
    learn = small(CapturedSteps(capture=ByHand), Stop())
    with pytest.raises(KeyboardInterrupt): fit(learn)
    learn.captured_steps.end()
    assert 'forward' not in vars(learn.model)


def test_a_learner_cleans_up_after_an_error(store, tmp_path):
    class Stop(Callback):
        order = CapturedSteps.order+1
        def before_batch(self):
            if self.iter==3: raise KeyboardInterrupt
    cbs = [CapturedSteps(capture=ByHand),Stop()]
    learn = mgmt_learner(mgmt_dls(store, bs=4), 'resnet10', path=tmp_path, cbs=cbs, graphs=False)
    with pytest.raises(KeyboardInterrupt): fit(learn)
    assert 'forward' not in vars(learn.model) and not learn.captured_steps.steps


def test_an_own_forward_is_kept():
    learn = small(CapturedSteps(capture=ByHand))
    calls,old = [],learn.model.forward
    def forward(x):
        calls.append(len(x))
        return old(x)
    learn.model.forward = forward
    fit(learn)
    assert learn.model.forward is forward and calls


def test_evaluation_is_not_captured():
    seen = []
    class Look(Callback):
        def after_pred(self): seen.append((self.training, self.pred.grad_fn is not None and 'Replay' in
            type(self.pred.grad_fn).__name__))
    fit(small(CapturedSteps(capture=ByHand), Look()))
    assert {o for o in seen if not o[0]}=={(False,False)} and (True,True) in seen


def test_reasons_are_said_once(capsys):
    learn = small(CapturedSteps(capture=ByHand))
    hook = learn.model[1].register_forward_hook(lambda m,i,o: None)
    fit(learn, 3)
    assert capsys.readouterr().out.splitlines()==["training steps run eagerly, not as CUDA graphs: '1' has hooks, "
        "which a graph does not call"]
    hook.remove()
    fit(learn)
    said = capsys.readouterr().out
    assert said.startswith('the training step of 8x3 runs as a CUDA graph (0.0 s to capture)') and 'other' not in said


@pytest.mark.parametrize('part', [None,0])
def test_what_is_compiled_in_place_is_left_to_its_compiler(capsys, part):
    plain = results(fit(small(), 2))
    learn = small(CapturedSteps(capture=ByHand))
    (learn.model if part is None else learn.model[part]).compile(backend='eager')
    assert equal(results(fit(learn, 2)), plain)
    what = 'the model' if part is None else "'0'"
    assert capsys.readouterr().out==f'training steps run eagerly, not as CUDA graphs: torch.compile has {what}\n'


def test_what_fails_runs_eagerly_and_is_not_tried_again(capsys):
    tried = []
    def fails(*args):
        tried.append(args)
        raise RuntimeError('no\nsuch thing')
    a,b = fit(small(CapturedSteps(capture=fails)), 2),fit(small(), 2)
    assert equal(results(a), results(b)) and len(tried)==1
    assert capsys.readouterr().out.splitlines()==['training steps of 8x3 run eagerly, not as a CUDA graph: no']


def test_a_second_backward_pass_is_refused():
    net,x = nn.Linear(3,1),torch.rand(4,3)
    step = ByHand(net, x, GraphMemory())
    y = step(x)
    y.sum().backward(retain_graph=True)
    with pytest.raises(MGMTError, match='graphs=False'): y.sum().backward()
    y,_ = step(x),step(x)
    with pytest.raises(MGMTError, match='another step came between'): y.sum().backward()


def test_gradients_are_handed_out():
    "They may be kept and added to, and the next step changes none of them"
    net,x = nn.Linear(3,1),torch.rand(2,4,3)
    step = ByHand(net, x[0], GraphMemory())
    step(x[0]).sum().backward()
    kept = net.weight.grad
    first = kept.clone()
    step(x[1]).sum().backward()
    assert torch.allclose(net.weight.grad, x.sum((0,1))[None]) and net.weight.grad is kept
    net.weight.grad = None
    step(x[1]).sum().backward()
    assert torch.allclose(kept-first, net.weight.grad)


def test_everything_is_put_back():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    def draws(): return torch.rand(2).tolist(),random.random(),np.random.rand()
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    before = [b.clone() for b in net.buffers()]
    with put_back(net, torch.device('cpu')) as drew:
        assert not drew.host()
        net(torch.rand(4,3)); draws()
        assert drew.host()
    now = draws()
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    assert now==draws() and all(torch.equal(a,b) for a,b in zip(before, net.buffers()))


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Linear(3,3), nn.Linear(3,3))
    net[1].weight = net[0].weight
    with own_leaves(net) as leaves:
        assert net[1].weight is net[0].weight is leaves[next(iter(leaves))]
        assert len(leaves)==3==len(list(net.parameters()))
    assert net[1].weight is net[0].weight and isinstance(net[0].weight, nn.Parameter)


def test_it_is_no_choice_of_a_recipe(store, tmp_path):
    one,two = (mgmt_learner(mgmt_dls(store, bs=4), 'resnet10', path=tmp_path, graphs=o) for o in (False,'auto'))
    assert training_key(one)==training_key(two) and recipe_that_ran(one)==recipe_that_ran(two)
    assert 'graphs' not in training_key(one)['recipe']


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a card')
def test_a_cpu_is_told(store, tmp_path):
    with pytest.raises(MGMTError, match="need a CUDA card.*graphs=False"):
        mgmt_learner(mgmt_dls(store, bs=4), 'resnet10', path=tmp_path, graphs=True)
    with pytest.raises(MGMTError, match="need a CUDA card"): fit(small(CapturedSteps()))
    fit(small(CapturedSteps(auto=True)))


def test_norms_of_several_processes_run_eagerly(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    x = torch.rand(2,3,4,4,4)
    assert why_eager(nn.Conv3d(3,1,1), (x,))==''
    for norm in (nn.SyncBatchNorm(3), set_norms(nn.Sequential(nn.BatchNorm3d(3)), 'sync')):
        assert 'several processes' in why_eager(norm, (x,))


# Real graphs

@pytest.fixture
def repeatable():
    old = torch.backends.cudnn.deterministic,torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic,torch.backends.cudnn.benchmark = True,False
    yield
    torch.backends.cudnn.deterministic,torch.backends.cudnn.benchmark = old


def compare(one, *other):
    "Equal to the bit where a training without graphs repeats itself, else as near as its repetition"
    graph,eager,again = one('card'),results(one('off')),results(one('off'))
    noise,found = apart(again, eager),apart(results(graph), eager)
    print(f'{captured(graph)}: {found:.1e} from eager, which is {noise:.1e} from itself')
    if equal(again, eager): assert equal(results(graph), eager), found
    else: assert found<max(10*noise, 1e-3)
    return graph


@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['float32','bf16','fp16'])
@pytest.mark.parametrize('arch', ['resnet10','efficientnet_b0','densenet121'])
def test_card_backbones(store, tmp_path, repeatable, arch, precision):
    graph = compare(lambda how: train(store, tmp_path/how, how, arch, precision=precision))
    assert captured(graph)==['4x1x16x32x32']


@pytest.mark.cuda
@pytest.mark.parametrize('law', LAWS)
def test_card_laws(store, tmp_path, repeatable, law):
    graph = compare(lambda how: train(store, tmp_path/how, how, **LAWS[law]))
    assert captured(graph)


@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['bf16','fp16'])
def test_card_everything_in_half_precision(store, tmp_path, repeatable, precision):
    compare(lambda how: train(store, tmp_path/how, how, 'efficientnet_b0', precision=precision, **LAWS['several']))


@pytest.mark.cuda
def test_card_recomputing(store, tmp_path, repeatable):
    graph = compare(lambda how: train(store, tmp_path/how, how, model_kwargs=dict(checkpoint=True)))
    assert captured(graph), graph.captured_steps.refused


@pytest.mark.cuda
def test_card_resumes(store, tmp_path, repeatable):
    paths = iter(range(9))
    compare(lambda how: resumed(store, tmp_path/f'{how}{next(paths)}', how))
    a,b = (results(f(store, tmp_path/n, 'card')) for n,f in dict(r=resumed, s=lambda *o: train(*o, head='published')
        ).items())
    assert apart(a, b)<1e-3


class Draws(nn.Module):
    "Draws in all ways that networks do"
    def __init__(self):
        super().__init__()
        self.conv,self.norm,self.fc = nn.Conv3d(1,8,3,padding=1),nn.BatchNorm3d(8),nn.Linear(8,1)
        self.drops = nn.Sequential(nn.Dropout3d(.3), DropPath(.3))
    def forward(self, x):
        x = x.as_subclass(torch.Tensor)
        x = self.drops(self.norm(self.conv(x)).relu()).mean((2,3,4))
        return self.fc(nn.functional.dropout(x, .4, self.training))


@pytest.mark.cuda
def test_card_draws_what_it_would_have_drawn(repeatable):
    def steps(graph):
        torch.manual_seed(0)
        net,x = Draws().cuda(),torch.rand(6,4,1,8,8,8).cuda()
        opt = torch.optim.SGD(net.parameters(), lr=.1)
        f = StepGraph(net, x[0], GraphMemory()) if graph else net
        for o in x:
            opt.zero_grad()
            f(o).square().mean().backward()
            opt.step()
        return torch.cat([p.flatten() for p in net.state_dict().values()]),torch.cuda.get_rng_state()
    (a,ra),(b,rb) = steps(True),steps(False)
    assert torch.equal(ra, rb) and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


class Waits(nn.Module):
    "Asks the card for a number in its forward pass"
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3,1)
    def forward(self, x): return nn.functional.dropout(self.fc(x), .2, self.training)*float(x.mean().item()>=0)


@pytest.mark.cuda
def test_card_goes_on_after_a_capture_that_failed(capsys):
    def trained(*cbs):
        torch.manual_seed(0)
        ds = [(torch.rand(3), torch.rand(1)) for _ in range(32)]
        dls = DataLoaders.from_dsets(ds, ds, bs=8, shuffle=False, device=torch.device('cuda'))
        return fit(Learner(dls, Waits(), loss_func=nn.MSELoss(), cbs=cbs), 2)
    a,b = trained(CapturedSteps()),trained()
    assert equal(results(a), results(b))
    assert 'run eagerly, not as a CUDA graph' in capsys.readouterr().out
    assert torch.rand(3, device='cuda').isfinite().all()
    assert captured(trained_small_on_card())


def trained_small_on_card():
    learn = small(CapturedSteps())
    learn.dls.to(torch.device('cuda'))
    return fit(learn, 2)


@pytest.mark.cuda
def test_card_gradients_are_handed_out():
    net,x = nn.Linear(3,1).cuda(),torch.rand(2,4,3).cuda()
    step = StepGraph(net, x[0], GraphMemory())
    for o in x: step(o).sum().backward()
    assert torch.allclose(net.weight.grad, x.sum((0,1))[None])
    y = step(x[0])
    y.sum().backward(retain_graph=True)
    with pytest.raises(MGMTError): y.sum().backward()


@pytest.mark.cuda
def test_card_gives_the_memory_back(store, tmp_path):
    import gc
    gc.collect()
    before = torch.cuda.memory_allocated()
    learn = train(store, tmp_path, 'card', 'efficientnet_b0')
    gc.collect()
    held = sum(p.numel()*4 for p in learn.model.parameters())
    assert torch.cuda.memory_allocated()-before<8*held+50e6


@pytest.mark.cuda
def test_card_gives_a_graph_up_for_the_last_batch(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('mgmt_fast.graphs._evaluation', 1e9)
    learn = train(store, tmp_path, 'card')
    assert not captured(learn) and 'GiB that are left do not do' in capsys.readouterr().out


class NoWaits(Callback):
    "Any wait for the card between a batch's first event and its last raises, once the step was captured"
    order,run_valid = -100,False
    def before_batch(self): torch.cuda.set_sync_debug_mode('error' if self.iter>=2 else 'default')


class WaitsAgain(Callback):
    order,run_valid = 100,False
    def after_batch(self): torch.cuda.set_sync_debug_mode('default')


@pytest.mark.cuda
@pytest.mark.parametrize('graphs', [True,False])
def test_card_is_not_waited_for(store, tmp_path, graphs):
    recipe = get_recipe('default', epochs=1, lr=1e-3, precision='bf16', clip_norm=1., accumulate=2, l2=1e-4)
    cbs = [NoWaits(),WaitsAgain()]
    learn = mgmt_learner(mgmt_dls(store, bs=4), 'resnet10', recipe, path=tmp_path, cbs=cbs, graphs=graphs)
    try: learn.fit_recipe()
    finally: torch.cuda.set_sync_debug_mode('default')
    assert all(o.device.type=='cpu' for o in learn.recorder.losses)


@pytest.mark.cuda
@pytest.mark.parametrize('graphs', [True,False])
def test_card_stops_before_the_weights_are_lost(store, tmp_path, repeatable, graphs):
    class Spoil(Callback):
        order = StopOnNaN.order-1
        def after_loss(self):
            if self.training and self.iter==2: self.learn.loss_grad = self.learn.loss = self.loss*float('nan')
    def spoiled(wait):
        learn = mgmt_learner(mgmt_dls(store, bs=4), 'resnet10', path=tmp_path/str(wait), cbs=[Spoil()], graphs=graphs)
        learn.stop_on_na_n.wait = wait
        with pytest.raises(TrainingError, match='epoch 0, batch 2,.*last good weights'): fit(learn)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    a,b = spoiled(None),spoiled(True)
    assert a.isfinite().all() and torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
def test_card_says_how_busy_it_was(store, tmp_path, capsys):
    learn = train(store, tmp_path, 'card')
    said = capsys.readouterr().out
    assert 'the training step of 4x1x16x32x32 runs as a CUDA graph' in said and '1 other shape runs eagerly' in said
    assert 'of the training loop' in said and 0<learn.captured_steps.report()['busy']<=1.01
