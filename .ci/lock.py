"Write requirements.lock: the versions, in this environment, of what settings.ini requires, and what that requires."
import re
from configparser import ConfigParser
from importlib.metadata import distribution, version
from pathlib import Path

from packaging.requirements import Requirement

root = Path(__file__).parent.parent
cfg = ConfigParser(delimiters=['='])
cfg.read(root/'settings.ini', encoding='utf-8')
todo,done = [Requirement(o) for o in cfg['DEFAULT']['requirements'].split()],{}
while todo:
    r = todo.pop()
    key = re.sub(r'[-_.]+', '-', r.name).lower(),tuple(sorted(r.extras))
    if key in done: continue
    done[key] = version(r.name)
    for o in map(Requirement, distribution(r.name).requires or []):
        if o.marker is None or any(o.marker.evaluate({'extra': e}) for e in ('',*r.extras)): todo.append(o)
lines = sorted({f"{name}=={v.split('+')[0]}" for (name,_),v in done.items()})
head = '# Written by .ci/lock.py, on Linux with Python 3.11; the container installs these.'
(root/'requirements.lock').write_text('\n'.join([head,*lines])+'\n', encoding='utf-8')
