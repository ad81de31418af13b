"What the container is made of: it cannot be built here, so its parts are held against each other."
import re
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LINES = [o for o in (ROOT/'requirements.lock').read_text().splitlines() if not o.startswith('#')]
LOCK = dict(o.split('==') for o in LINES)


def plain(name): return re.sub(r'[-_.]+', '-', name).lower()


def test_the_lock_has_exact_versions_and_no_places():
    assert LINES==sorted(LINES) and len(LOCK)==len(LINES)
    for o in LINES: assert re.fullmatch(r'[a-z0-9-]+==[0-9][0-9A-Za-z.]*', o), o


def test_the_lock_covers_the_requirements():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    for o in map(Requirement, cfg['DEFAULT']['requirements'].split()):
        assert plain(o.name) in LOCK and o.specifier.contains(LOCK[plain(o.name)]), o


def test_the_lock_is_closed():
    "What a locked package needs, on this Python, is locked too, in a version that it takes"
    for name,v in LOCK.items():
        try: d = distribution(name)
        except PackageNotFoundError: continue
        if d.version.split('+')[0]!=v: continue
        for o in map(Requirement, d.requires or []):
            if o.marker is None or o.marker.evaluate({'extra':''}):
                assert plain(o.name) in LOCK and o.specifier.contains(LOCK[plain(o.name)], prereleases=True), (name,
                    str(o))


def test_dockerfile_copies_what_there_is_and_installs_the_lock():
    text = re.sub(r'\\\n', ' ', (ROOT/'Dockerfile').read_text())
    steps = [o.split(None,1) for o in text.splitlines() if o and not o.startswith('#')]
    assert {o for o,_ in steps}<={'FROM','RUN','WORKDIR','COPY','ENV','USER','CMD'} and steps[0][0]=='FROM'
    assert re.fullmatch(r'nvidia/cuda:\d+\.\d+\.\d+-(base|runtime)-\w+', steps[0][1]), 'an exact tag'
    ignore = (ROOT/'.dockerignore').read_text().split()
    for args in (a.split() for o,a in steps if o=='COPY'):
        for src in args[:-1]: assert (ROOT/src).exists() and f'!{src}' in ignore, src
    order = [i for i,(o,a) in enumerate(steps) if o=='RUN' and 'pip install' in a]
    assert '-r requirements.lock' in steps[order[0]][1] and '--no-deps .' in steps[order[1]][1]
    assert [o for o,_ in steps].index('USER')>order[-1], 'it does not run as root'
    assert text.count('docker build')==text.count('docker run')==1
