"""Convolutions by the kernels of a card, which Triton interprets here, against torch's own operators: values and all
gradients. Run on its own, since Triton asks for TRITON_INTERPRET when it is loaded."""
import copy
import itertools
import os

os.environ['TRITON_INTERPRET'] = '1'

import torch

from mgmt_fast.operators import InflatedConv3d, SeparableConv3d, plain_operators, route

# in, out, kernel, stride, groups, padding: stems, strided and wide depthwise kernels, dense and pointwise ones
SHAPES = [(1,3,(3,3,3),(2,2,2),1,(1,1,1)),(2,3,(7,7,7),(1,2,2),1,(3,3,3)),(3,3,(3,3,3),(2,2,2),3,(1,1,1)),
    (3,3,(5,5,5),(2,2,2),3,(2,2,2)),(5,2,(3,3,3),(1,1,1),1,(1,1,1)),(5,2,(1,1,1),(1,1,1),1,(0,0,0)),
    (3,3,(1,3,3),(1,2,2),3,(0,1,1))]


def computed(conv, x):
    conv,x = copy.deepcopy(conv),x.clone().requires_grad_()
    y = conv(x)
    (y*torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(),x.grad,*[p.grad for p in conv.parameters()]


def main():
    torch.manual_seed(0)
    n = 0
    for cls,same,mode,shape in itertools.product((InflatedConv3d,SeparableConv3d), (False,True), ('replicate','zeros'),
            SHAPES):
        I,O,k,s,groups,pad = shape
        if cls is SeparableConv3d and k[0]==1: continue
        conv = cls(I, O, k, s, (1,1,1), groups, True, pad, same, mode)
        for p in conv.parameters(): torch.nn.init.normal_(p)
        for D in (1,3) if mode=='replicate' else (3,):
            x = torch.randn(1, I, D, 5, 6)
            assert route(x)=='card'
            a = computed(conv, x)
            with plain_operators(): b = computed(conv, x)
            for p,q in zip(a, b): assert (p-q).norm()<=1e-5*q.norm()+1e-6, (shape,cls,same,mode,D)
            n += 1
    print(f'{n} convolutions')


if __name__=='__main__': main()
