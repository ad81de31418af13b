"""Run a command of the command line in a process of its own.

A server imports the library once; each command is a fork of it, since most of a short command's time goes to imports.
"""
import multiprocessing as mp
import os
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from subprocess import CompletedProcess

_forks = mp.get_context('forkserver')
_forks.set_forkserver_preload(['mgmt_fast.all'])


def _enter(command, args, out, err, cwd, env):
    for to,fd in ((out,1),(err,2)):
        with open(to, 'wb') as f: os.dup2(f.fileno(), fd)
    os.environ.clear()
    os.environ.update(env)
    if cwd: os.chdir(cwd)
    sys.argv = [command,*args]
    script, = entry_points(group='console_scripts', name=command)
    sys.exit(script.load()())


def run_command(
    command, # As in settings.ini
    *args, # Words and options
    cwd=None, env=None,
): # As of `subprocess.run` with `capture_output=True, text=True`
    "Run a command as its installed script does, and wait for it."
    with tempfile.TemporaryDirectory() as td:
        out,err = Path(td)/'out',Path(td)/'err'
        args = [*map(str, args)]
        p = _forks.Process(target=_enter, args=(command, args, out, err, cwd, dict(env or os.environ)))
        p.start()
        p.join()
        return CompletedProcess([command,*args], p.exitcode, *(o.read_text(encoding='utf-8') for o in (out,err)))
