"What a benchmark's figures were had on, in one line."
import os, platform, time

import torch


def machine():
    cpu = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        cpu = next((o.split(':')[1].strip() for o in open('/proc/cpuinfo') if o.startswith('model name')), cpu)
    gpu = f', {torch.cuda.get_device_name()}' if torch.cuda.is_available() else ''
    hardware = f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}, load {os.getloadavg()[0]:.1f}"
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{hardware}; {software}; {time.strftime('%Y-%m-%d')}"
