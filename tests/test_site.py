"The site: one order of pages everywhere, and workflows that GitHub can read."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
ROOMS = [p.name for p in sorted(NBS.glob('*.ipynb')) if p.name[0].isdigit()]


def listed(contents):
    "Files of a sidebar, from top to bottom"
    for o in contents:
        if isinstance(o, str): yield o
        elif 'contents' in o: yield from listed(o['contents'])
        else: yield o['href']


def sidebar(): return list(listed(yaml.safe_load((NBS/'sidebar.yml').read_text())['website']['sidebar']['contents']))


def test_numbers_sidebar_and_readme_have_one_order():
    numbers = [p.partition('_')[0] for p in ROOMS]
    assert len(set(numbers))==len(numbers), 'each room has a number of its own'
    assert [o for o in sidebar() if o[0].isdigit()]==ROOMS
    index = '\n'.join(''.join(c['source']) for c in json.loads((NBS/'index.ipynb').read_text())['cells'])
    table = re.findall(r'^\| \[\w+\]\((\w+)\.html\) \|', index, re.M)
    assert table==[re.sub(r'^\d+_|\.ipynb$', '', o) for o in ROOMS if '_all' not in o]


def methods(source):
    "Public methods with a docstring of the public classes that a cell defines"
    classes = [o for o in ast.parse(source).body if isinstance(o, ast.ClassDef) and not o.name.startswith('_')]
    public = [(c,o) for c in classes for o in c.body if isinstance(o, ast.FunctionDef) and not o.name.startswith('_')]
    return {f'{c.name}.{o.name}' for c,o in public if ast.get_docstring(o)}


@pytest.mark.parametrize('name', ROOMS)
def test_public_methods_are_on_the_page(name):
    cells = json.loads((NBS/name).read_text())['cells']
    code = [''.join(c['source']) for c in cells if c['cell_type']=='code']
    exported = [o for o in code if re.search(r'^#\| ?exports?\b', o, re.M)]
    shown = set(re.findall(r'^show_doc\((\w+\.\w+)', '\n'.join(code), re.M))
    assert not set().union(*map(methods, exported))-shown, 'each needs a cell `show_doc(Class.method)`'


def test_the_sidebar_names_every_page_once():
    pages = sorted(p.name for p in NBS.glob('*.ipynb'))
    assert sorted(sidebar())==pages


@pytest.mark.parametrize('path', sorted((ROOT/'.github/workflows').glob('*.yaml')), ids=lambda p: p.name)
def test_workflows_are_valid(path):
    tool = Path(sys.executable).parent/'check-jsonschema'
    r = subprocess.run([tool, '--builtin-schema', 'vendor.github-workflows', path], capture_output=True, text=True)
    assert r.returncode==0, r.stdout+r.stderr
