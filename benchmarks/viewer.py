"""How long the viewer takes to answer: four sequences at the competition's size, each on a grid of its own, with an
overlay.

usage: viewer.py [--moves 20]
Prints the median and the longest time from a slider's move to the picture, and their parts."""
import argparse, time

import numpy as np, torch
from machine import machine
from mgmt_fast.core import SEQUENCES, Volume
from mgmt_fast.phantom import draw_patients, render_patient
from mgmt_fast.viewer import View


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--moves', type=int, default=20)
    o = p.parse_args()
    images = render_patient(draw_patients(1).iloc[0], slices=155, size=240, fov=240, tilt=8)
    heat = Volume(torch.rand(40,60,60), images['FLAIR'][0].affine@np.diag([4,4,4,1]))
    shown = View({s: images[s][0] for s in SEQUENCES}, heat)
    box,times = shown.widget(),[]
    slider = box.children[0].children[2]
    for z in np.linspace(-30, 40, o.moves):
        start = time.perf_counter()
        slider.value = float(z)
        times.append(time.perf_counter()-start)
    start = time.perf_counter()
    for _ in range(5): shown.picture()
    planes = (time.perf_counter()-start)/5
    print(machine())
    print(f"an answer takes {np.median(times):.3f} s (median of {o.moves}; longest {max(times):.3f} s), "
        f"of which the planes take {planes:.3f} s; picture {shown.picture().shape[1]} x {shown.picture().shape[0]}")


if __name__=='__main__': main()
