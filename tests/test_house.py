"""The house: one room imports no secrets of another, lines fit, public parameters say what they take.

And the numbers of `benchmarks/house.py`, on a package small enough to count by hand."""
import ast
import json
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'benchmarks'))
from house import borrowed, functions, house, is_patched

WIDTH = 120
ROOMS = sorted(p for p in (root/'mgmt_fast').glob('[a-z]*.py') if p.stem!='all')
NOTEBOOKS = sorted((root/'nbs').glob('*.ipynb'))
SCRIPTS = sorted(p for folder in ('tests','benchmarks','kaggle') for p in (root/folder).rglob('*.py'))


def names(paths): return [str(p.relative_to(root)) for p in paths]


@pytest.mark.parametrize('path', ROOMS, ids=names(ROOMS))
def test_rooms_borrow_no_private_names(path):
    assert not borrowed(ast.parse(path.read_text(encoding='utf-8')), 'mgmt_fast')


def named(tree):
    "What stands at the top of a module: name and node; methods that are patched in belong to their class"
    for o in tree.body:
        made = isinstance(o, (ast.FunctionDef,ast.ClassDef))
        if made and not is_patched(o): yield o.name,o
        if isinstance(o, ast.Assign):
            yield from ((n.id,o) for t in o.targets for n in ast.walk(t) if isinstance(n, ast.Name))


def test_a_private_name_stands_for_one_thing():
    "Of the whole package, so that a reader who looks for a name finds one thing"
    rooms = {}
    for path in ROOMS:
        for n in {n for n,_ in named(ast.parse(path.read_text(encoding='utf-8'))) if n.startswith('_') and n!='_'}:
            rooms.setdefault(n, []).append(path.stem)
    assert not {n: r for n,r in rooms.items() if len(r)>1 and not n.startswith('__')}


def bound(tree):
    "All names that a module gives to something"
    for o in ast.walk(tree):
        if isinstance(o, ast.Name) and not isinstance(o.ctx, ast.Load): yield o.id
        if isinstance(o, (ast.FunctionDef,ast.ClassDef)): yield o.name
        if isinstance(o, ast.arg): yield o.arg
        if isinstance(o, ast.alias): yield o.asname or o.name


@pytest.mark.parametrize('path', ROOMS, ids=names(ROOMS))
def test_private_names_exist_and_are_used(path):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    used = {o.id for o in ast.walk(tree) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Load)}
    private = {o for o in used if o.startswith('_') and not o.startswith('__')}
    assert not private-set(bound(tree)), 'used, and defined nowhere'
    tops = {n for n,_ in named(tree) if n.startswith('_') and not n.endswith('_')}
    assert not tops-used-{'_'}, 'defined, and used nowhere'


@pytest.mark.parametrize('path', ROOMS, ids=names(ROOMS))
def test_no_function_takes_the_name_of_another_thing(path):
    found = [*named(ast.parse(path.read_text(encoding='utf-8')))]
    functions = [k for k,o in found if not isinstance(o, ast.Assign)]
    twice = [k for k in functions if sum(k==other for other,_ in found)>1]
    assert not twice


def too_wide(lines): return [f'{i}: {o[:60]} ...' for i,o in enumerate(lines, 1) if len(o)>WIDTH]


def written(path):
    "Lines of a module that somebody wrote: nbdev writes `__all__` with its own width"
    text = path.read_text(encoding='utf-8')
    own = next((o for o in ast.parse(text).body if isinstance(o, ast.Assign) and o.targets[0].id=='__all__'), None)
    lines = text.splitlines()
    return lines if own is None else lines[:own.lineno-1]+lines[own.end_lineno:]


@pytest.mark.parametrize('path', ROOMS, ids=names(ROOMS))
def test_lines_of_rooms_fit(path): assert not too_wide(written(path))


@pytest.mark.parametrize('path', SCRIPTS, ids=names(SCRIPTS))
def test_lines_of_scripts_fit(path):
    assert not too_wide(path.read_text(encoding='utf-8').splitlines())


@pytest.mark.parametrize('path', NOTEBOOKS, ids=names(NOTEBOOKS))
def test_lines_of_code_cells_fit(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    lines = [o for c in cells if c['cell_type']=='code' for o in ''.join(c['source']).splitlines()]
    assert not too_wide(lines)


def class_of(f):
    "The class that a function is patched into, with a dot; nothing if it is a function"
    return f'{f.args.args[0].annotation.id}.' if is_patched(f) else ''


def public_functions(tree):
    "Public functions, and public methods and `__init__` of public classes"
    for o in tree.body:
        if isinstance(o, ast.FunctionDef) and not o.name.startswith('_'): yield class_of(o)+o.name,o
        if not isinstance(o, ast.ClassDef) or o.name.startswith('_'): continue
        for m in o.body:
            named = isinstance(m, ast.FunctionDef) and (m.name=='__init__' or not m.name.startswith('_'))
            if named: yield f'{o.name}.{m.name}',m


def parameters(f):
    "All of a function's but `self` and `cls`"
    a = f.args
    own = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg,a.kwarg))]
    return [p for p in own if p.arg not in ('self','cls')]


def bases(tree):
    "Class -> the public classes of the same module that it is made from, near ones first"
    own = {}
    for o in tree.body:
        if not isinstance(o, ast.ClassDef): continue
        named = [b.id for b in o.bases if isinstance(b, ast.Name) and not b.id.startswith('_')]
        own[o.name] = [*named, *(c for b in named for c in own.get(b, []))]
    return own


def told_by_a_base(name, f, known, own):
    "Does the method have the parameters of a base's, which says what they are?"
    cls,_,method = name.rpartition('.')
    told = [known[f'{b}.{method}'] for b in own.get(cls, []) if f'{b}.{method}' in known]
    return any([p.arg for p in parameters(f)]==[p.arg for p in parameters(o)] for o in told)


def lacking(text):
    """Public parameters without a comment on their line, or without a type; `*args` and `**kwargs` need no type.

    A method that replaces one of a public base in the same module need not repeat what is said there."""
    lines,res,tree = text.splitlines(),[],ast.parse(text)
    known,own = dict(public_functions(tree)),bases(tree)
    for name,f in known.items():
        if told_by_a_base(name, f, known, own): continue
        for p in parameters(f):
            if '# ' not in lines[p.end_lineno-1]: res.append(f'{name}({p.arg}): no comment')
            if p.annotation is None and p not in (f.args.vararg,f.args.kwarg): res.append(f'{name}({p.arg}): no type')
    return res


@pytest.mark.parametrize('path', ROOMS, ids=names(ROOMS))
def test_no_default_is_an_array(path):
    "It could be changed by a call, and nbdev cannot show it"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    defaults = [ast.unparse(d) for o in functions(tree) for d in (*o.args.defaults, *o.args.kw_defaults) if d]
    assert not [d for d in defaults if d.startswith(('np.','torch.')) and '(' in d]


@pytest.mark.parametrize('path', ROOMS, ids=names(ROOMS))
def test_public_parameters_have_a_comment_and_a_type(path):
    assert not lacking(path.read_text(encoding='utf-8'))


def test_what_lacks_a_comment_or_a_type_is_seen():
    text = 'class A:\n    def __init__(self,\n        x:int, # Good\n        y, # Bad\n    ): pass\ndef _f(z): pass\n'
    assert lacking(text)==['A.__init__(y): no type']
    assert lacking('def f(x:int): pass')==['f(x): no comment']


def test_a_patched_method_is_one_of_its_class():
    patched = "@patch\ndef f(self:B, {}): pass"
    assert not lacking(BASE+'class B(A): pass\n'+patched.format('x'))
    assert lacking(BASE+'class B(A): pass\n'+patched.format('y'))==['B.f(y): no comment', 'B.f(y): no type']


BASE = 'class A:\n    def f(self,\n        x:int, # Good\n    ): pass\n'


def test_a_base_says_what_its_methods_take():
    assert not lacking(BASE+'class B(A):\n    def f(self, x): pass\nclass C(B):\n    def f(self, x): pass')
    assert lacking(BASE+'class B(A):\n    def f(self, y): pass')==['B.f(y): no comment', 'B.f(y): no type']
    assert lacking(BASE+'class B:\n    def f(self, x): pass')==['B.f(x): no comment', 'B.f(x): no type']


ROOM = '''from .other import _hidden, shown
_a,b = 1,2

def public(x):
    "Left out"
    return x

class _Private:
    def method(self):
        return 1
'''


@pytest.fixture
def package(tmp_path):
    (tmp_path/'room.py').write_text(ROOM)
    (tmp_path/'other.py').write_text('# '+'-'*130+'\n_hidden = shown = None\n')
    return tmp_path


def test_counts(package):
    t = house(package)
    r = t.loc['room']
    assert (r.functions, r.public, r.private, r.borrowed)==(2,2,2,1)
    assert r.lines==2.5 and r['>120 %']==0
    assert r.nodes==2.5, 'return of a name: Return, Name, Load; of a number: Return, Constant'


def test_widths_and_total(package):
    t = house(package)
    assert t.loc['other','>120 %']==50 and t.loc['other','>140 %']==0
    assert t.loc['total','functions']==2 and t.loc['total','public']==3 and t.loc['total','borrowed']==1


def test_our_own_package():
    t = house(root/'mgmt_fast')
    assert set(t.index)-{'total'}=={p.stem for p in (root/'mgmt_fast').glob('*.py')}-{'_modidx'}
    for c in ('functions','public','private','borrowed'): assert t.loc['total',c]==t.drop('total')[c].sum()
