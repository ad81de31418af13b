"""Time and memory of one training step (forward, loss, backward) of our backbones and their peers' in turns.

usage: step.py [--size 1x32x128x128] [--archs efficientnet_b1,...] [--who ours timm_3d ...] [--norms train|eval]
               [--rounds 3] [--reps 5] [--device cpu|cuda]

CPU: float32, 2 threads. GPU: bf16 autocast, batch 8 unless --size says otherwise, with and without torch.compile.
Each network runs in a process of its own. Networks take turns, round after round, so that a machine that slows down
slows all of them.
`--norms eval` holds batch norm's statistics still, as the peers' own script does. Memory is what a step needs beyond
the loaded model (CPU: resident set at its highest; GPU: torch's peak). Peers that are not installed are left out with
a line that says so."""
import argparse, importlib.util, json, resource, statistics, subprocess, sys, time, warnings

MONAI = dict(efficientnet_b1=lambda N: N.EfficientNetBN('efficientnet-b1', pretrained=False, spatial_dims=3,
    in_channels=1, num_classes=1),
    efficientnet_b3=lambda N: N.EfficientNetBN('efficientnet-b3', pretrained=False, spatial_dims=3, in_channels=1,
    num_classes=1),
    densenet121=lambda N: N.DenseNet121(spatial_dims=3, in_channels=1, out_channels=1),
    resnet18=lambda N: N.resnet18(spatial_dims=3, n_input_channels=1, num_classes=1, conv1_t_stride=2),
    resnet10=lambda N: N.resnet10(spatial_dims=3, n_input_channels=1, num_classes=1))
NOT_IN_TIMM_3D = ('xception','resnet10')
KINDS = {'ours':{}, 'ours, recomputing':dict(checkpoint=True), 'ours, full':dict(depth='full'),
    'ours, all split':dict(depth='separable_all')}


def build(who, arch, size):
    "The network and a batch with its axes in the order that the network's library expects"
    import torch
    B,D,H,W = size
    if who.startswith('ours'):
        from mgmt_fast.backbones import create_backbone
        return create_backbone(arch,
            **KINDS[who.removesuffix(', compiled').removesuffix(', memory kept')]),torch.rand(B,1,D,H,W)
    x = torch.rand(B,1,H,W,D)
    if who.startswith('timm_3d'):
        import timm_3d
        return timm_3d.create_model(arch, in_chans=1, num_classes=1),x
    import monai.networks.nets as N
    return MONAI[arch](N),x


def resident(): return int(open('/proc/self/statm').read().split()[1])*resource.getpagesize()/2**20


def highest(reset=False):
    if reset: open('/proc/self/clear_refs','w').write('5')
    return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith('VmHWM'))


def measure(who, arch, size, norms, reps, device):
    "One process' work: JSON with the seconds of each step, MiB and parameters"
    import torch
    warnings.simplefilter('ignore')
    torch.manual_seed(0)
    if device=='cpu': torch.set_num_threads(2)
    if who.endswith('memory kept'):
        from mgmt_fast.operators import keep_freed_memory
        keep_freed_memory()
    model,x = build(who, arch, size)
    model,x,y = model.to(device).train(),x.to(device),torch.ones(size[0],1,device=device)
    if norms=='eval': [m.eval() for m in model.modules() if 'BatchNorm' in type(m).__name__]
    net = torch.compile(model) if who.endswith('compiled') else model
    params,base,times = list(model.parameters()),resident(),[]
    first = time.perf_counter()
    for i in range(reps+2):
        if i==2 and device=='cpu': base = resident() if base is None else base; highest(reset=True)
        if i==2 and device=='cuda': torch.cuda.reset_peak_memory_stats()
        for p in params: p.grad = None
        t = time.perf_counter()
        with torch.autocast('cuda', torch.bfloat16, enabled=device=='cuda'):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(net(x).float(), y)
        loss.backward()
        if device=='cuda': torch.cuda.synchronize()
        times.append(time.perf_counter()-t)
        if i==1: warm = time.perf_counter()-first
    mib = torch.cuda.max_memory_allocated()/2**20 if device=='cuda' else highest()-base
    print('RESULT'+json.dumps(dict(times=times[2:], mib=mib, params=sum(p.numel() for p in params)/1e6, warm=warm)))


def plan(a, device, has):
    "Who is measured on an architecture"
    yield 'ours'
    if a in ('efficientnet_b1','efficientnet_b3'):
        yield 'ours, recomputing'
        if device=='cpu': yield from ('ours, memory kept','ours, recomputing, memory kept')
    if a=='efficientnet_b1': yield 'ours, full'
    if a in ('densenet121','resnet18'): yield 'ours, all split'
    if a not in NOT_IN_TIMM_3D and has['timm_3d']: yield 'timm_3d'
    if a in MONAI and has['monai']: yield 'monai'
    if device=='cuda' and a=='efficientnet_b1':
        yield 'ours, compiled'
        if has['timm_3d']: yield 'timm_3d, compiled'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', help='BxDxHxW')
    p.add_argument('--archs', default='efficientnet_b1,efficientnet_b3,xception,densenet121,resnet18,resnet10')
    p.add_argument('--norms', default='train', choices=['train','eval'])
    p.add_argument('--reps', type=int, default=5)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--who', nargs='*', help="'ours' timm_3d ...; all if none")
    p.add_argument('--device')
    p.add_argument('--one', help=argparse.SUPPRESS)
    o = p.parse_args()
    import torch
    from machine import machine
    device = o.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    size = [int(i) for i in (o.size or ('8x32x128x128' if device=='cuda' else '1x32x128x128')).split('x')]
    if o.one: return measure(*o.one.split('|'), size, o.norms, o.reps, device)
    if device=='cpu': torch.set_num_threads(2)
    kind = 'bf16' if device=='cuda' else 'float32'
    print(f"{machine()}; batch {'x'.join(map(str,size))}, {kind}, batch norm in {o.norms} mode")
    has = {n:importlib.util.find_spec(n) is not None for n in ('timm_3d','monai')}
    for n,h in has.items():
        if not h: print(f'{n} is not installed: left out')
    head = f"{'arch':16} {'who':30} {'s/step':>8} {'least':>8} {'vol/s':>7} {'MiB':>7} {'M par':>6}"
    print(f"{head}   ours: times faster, share of memory", flush=True)
    for arch in o.archs.split(','):
        whos,runs = [w for w in plan(arch, device, has) if not o.who or w in o.who],{}
        for who in whos*o.rounds:
            cmd = [sys.executable, __file__, '--one', f'{who}|{arch}', '--size', 'x'.join(map(str,size)), '--norms',
                o.norms, '--reps', str(o.reps), '--device', device]
            try: r = subprocess.run(cmd, capture_output=True, text=True, timeout=600 if device=='cpu' else 150)
            except subprocess.TimeoutExpired: print(f'{arch:16} {who:30} took too long', flush=True); continue
            out = next((l[6:] for l in r.stdout.splitlines() if l.startswith('RESULT')), None)
            if out is None:
                print(f"{arch:16} {who:30} failed: {(r.stderr.strip().splitlines() or ['no message'])[-1][:150]}",
                    flush=True)
            else: runs.setdefault(who, []).append(json.loads(out))
        show(arch, runs, size[0])


def show(arch, runs, B):
    "One line per network: medians over all steps and rounds, and beside ours"
    med = {w:(statistics.median(sum((r['times'] for r in rs), [])),statistics.median(r['mib'] for r in rs)) for w,
        rs in runs.items()}
    for w,(s,mib) in med.items():
        us = f"{s/med['ours'][0]:5.2f}x {med['ours'][1]/max(mib,1e-9):6.2f}" if w!='ours' and 'ours' in med else ''
        least,params = min(min(r['times']) for r in runs[w]),runs[w][0]['params']
        print(f"{arch:16} {w:30} {s:8.3f} {least:8.3f} {B/s:7.2f} {mib:7.0f} {params:6.1f}   {us}", flush=True)


if __name__=='__main__': main()
