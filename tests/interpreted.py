"""Layers by the kernels of a card, which Triton interprets here, against torch's own operators: values, all gradients
and what norms keep. Each shape of each backbone is taken, with few channels. Run on its own, since Triton asks for
TRITON_INTERPRET when it is loaded."""
import copy
import os
from collections import Counter

os.environ['TRITON_INTERPRET'] = '1'

import torch
from torch import nn

from mgmt_fast import operators
from mgmt_fast.backbones import ARCHS, MEDICALNETS, create_backbone
from mgmt_fast.operators import *

MORE = [ # of other networks: dilation, kernels of one slice
    (InflatedConv3d, (3,3,3), (1,1,1), (2,2,2), (2,2,2), False, 'zeros', 'depthwise'),
    (InflatedConv3d, (1,3,3), (1,2,2), (1,1,1), (0,1,1), False, 'replicate', 'depthwise')]
CHANNELS = dict(depthwise=(3,3,3), few=(1,3,1), many=(5,2,1)) # in, out, groups


def shapes():
    "What distinguishes the layers of all backbones for a kernel, but the number of channels"
    for arch in (*ARCHS,'resnet10',*MEDICALNETS):
        for m in create_backbone(arch, pretrained=False).modules():
            if isinstance(m, InflatedConv3d):
                kind = 'depthwise' if m.groups==m.in_channels>1 else 'few' if m.in_channels<=4 else 'many'
                yield type(m),m.kernel_size,m.stride,m.dilation,m.padding,m.same,m.along.mode,kind
            elif isinstance(m, BatchNormAct3d): yield type(m),type(getattr(m, 'act', None))
            elif isinstance(m, InflatedPool3d):
                yield type(m),type(m.plane),m.plane.kernel_size,m.kind,m.along.k,m.along.s


def convs(cls, kernel, stride, dilation, padding, same, mode, kind):
    "As a backbone has it, and as its choices `depth` and `anisotropic` make it: in one piece or two, less deep or not"
    for c in (InflatedConv3d,SeparableConv3d) if kernel[0]>1 else (InflatedConv3d,):
        wide = c is InflatedConv3d and kernel[0]>3 # hundreds of taps: as it is alone
        for s in {stride} if wide else {stride,(1,*stride[1:])}:
            I,O,groups = CHANNELS[kind]
            conv = c(I, O, kernel, s, dilation, groups, True, padding, same, mode)
            for p in conv.parameters(): nn.init.normal_(p)
            for D in {s[0],s[0]+1} if kernel[0]<5 else {s[0]+1}: yield conv,(1,I,D,5,6)


def norm(cls, act):
    layer = cls(40) # more channels than a tile has
    if act is not type(None): layer.act,layer.drop = act(),nn.Identity()
    for p in (*layer.parameters(),layer.running_mean): nn.init.normal_(p)
    for training in (True,False): yield layer.train(training),(2,40,2,5,6)


def pool(cls, plane, k, kind, kernel, stride):
    padding = int(plane is nn.MaxPool2d)
    for s in {stride,1}: yield cls(plane(k, 2, padding), kind, kernel, s, padding=padding),(1,3,4,5,6)


def computed(layer, x):
    layer,x = copy.deepcopy(layer),x.clone().requires_grad_()
    y = layer(x)
    (y*torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    kept = [b for b in layer.buffers() if b.is_floating_point()]
    return y.detach(),x.grad,*[p.grad for p in layer.parameters()],*kept


def same(a, b, *what):
    for p,q in zip(a, b, strict=True):
        assert p.shape==q.shape and (p-q).norm()<=1e-4*q.norm()+1e-6, what


def counted(f, n):
    "A function that counts its calls"
    def call(*args):
        n['in one pass'] += 1
        return f(*args)
    return call


def main():
    torch.manual_seed(0)
    n = Counter()
    operators.card_separable = counted(operators.card_separable, n)
    for cls,*how in dict.fromkeys([*shapes(),*MORE]):
        made = norm if cls is BatchNormAct3d else pool if cls is InflatedPool3d else convs
        for layer,size in made(cls, *how):
            x = torch.randn(size)
            assert route(x)=='card'
            a = computed(layer, x)
            with plain_operators(): b = computed(layer, x)
            same(a, b, layer, size)
            n[type(layer).__name__] += 1
            if isinstance(layer, SeparableConv3d):
                with one_pass(): same(computed(layer, x), b, layer, size)
    print(*(f'{v} {k}' for k,v in sorted(n.items())), sep=', ')


if __name__=='__main__': main()
