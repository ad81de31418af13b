"""Rounds of timing, the same in every benchmark.

Contenders take turns, so that a machine that slows down slows all of them."""
import time

import numpy as np


def seconds(
    f, # Called without arguments
    sync=lambda: None, # Waits until a device has done what it was told
):
    "Seconds of one call"
    start = time.perf_counter()
    f()
    sync()
    return time.perf_counter()-start


def rounds(
    work, # Name to what is timed, called without arguments
    reps, # Rounds
    warm=True, # Call each once before?
    sync=lambda: None, # Waits until a device has done what it was told
):
    "Seconds of each contender in each round, `{name: [seconds]}`"
    if warm:
        for f in work.values(): seconds(f, sync)
    times = {k: [] for k in work}
    for _ in range(reps):
        for k,f in work.items(): times[k].append(seconds(f, sync))
    return times


def spans(times):
    "Median, least and greatest seconds of each contender"
    return {k: (np.median(v),min(v),max(v)) for k,v in times.items()}
