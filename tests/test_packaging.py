"What a stranger installs and reads: metadata, wheel, commands, notebooks, and the rules that all files keep."
import ast, json, re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from email.parser import Parser
from importlib import import_module
from pathlib import Path

import pytest

import mgmt_fast

root = Path(__file__).resolve().parent.parent
cfg = ConfigParser(delimiters=['='])
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
scripts = dict(o.split('=') for o in cfg['console_scripts'].split())
modules = sorted((root/'mgmt_fast').glob('*.py'))
tables = sorted(p for o in ('*.csv','page.*','py.typed') for p in (root/'mgmt_fast').glob(o))
notebooks = sorted((root/'nbs').glob('*.ipynb'))
rooms = [p for p in notebooks if p.name[0].isdigit()]
kernels = sorted((root/'kaggle').glob('*/*.ipynb'))
texts = [p for o in ('nbs/*.ipynb','kaggle/**/*.*','mgmt_fast/*.py','tests/*.py','benchmarks/*.*','*.*','Makefile',
    'Dockerfile','LICENSE','.ci/*','.gitignore') for p in root.glob(o) if p.is_file() and '.egg-info' not in str(p)]


def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']
def source(c): return ''.join(c['source'])
def ids(paths): return [p.stem for p in paths]
def outputs(nb):
    "Text of all outputs, pictures left out"
    for c in cells(nb):
        for o in c.get('outputs', []):
            data = [''.join(v) for k,v in o.get('data', {}).items() if isinstance(v, (str,list))
                and not k.startswith('image/')]
            text = ''.join(o.get('text', [])) + ''.join(data) + '\n'.join(o.get('traceback', []))
            yield o.get('name', o['output_type']),text


@pytest.fixture(scope='module')
def wheel(wheel_file): return zipfile.ZipFile(wheel_file)


def test_wheel_holds_all_modules_and_tables_and_nothing_else(wheel):
    files = {o for o in wheel.namelist() if '.dist-info/' not in o}
    assert tables and files=={f'mgmt_fast/{p.name}' for p in modules+tables}
    assert Path(wheel.filename).stat().st_size<2**20


def test_wheel_metadata(wheel):
    def read(name): return wheel.read(next(o for o in wheel.namelist() if o.endswith(f'.dist-info/{name}'))).decode()
    meta = Parser().parsestr(read('METADATA'))
    assert (meta['Name'].replace('-','_'), meta['Version'], meta['Summary'])==(cfg['lib_name'], cfg['version'],
        cfg['description'])
    assert meta['Requires-Python']=='>='+cfg['min_python']
    assert 'Apache-2.0' in (meta['License-Expression'] or meta['License'] or '')
    assert len(meta.get_payload())>500, 'the README is the long description'
    need = [o for o in meta.get_all('Requires-Dist') if 'extra ==' not in o]
    assert {re.split('[<>=!~ ]', o)[0].lower() for o in need}=={re.split('[<>=!~]', o)[0].lower()
        for o in cfg['requirements'].split()}
    assert {'dev'}<={o for o in meta.get_all('Provides-Extra')}=={k.removesuffix('_requirements') for k in cfg
        if k.endswith('_requirements')}
    points = ConfigParser(delimiters=['='])
    points.read_string(read('entry_points.txt'))
    assert dict(points['console_scripts'])==scripts
    assert any(o.endswith('/LICENSE') for o in wheel.namelist())


def test_one_version_everywhere():
    out = subprocess.run([sys.executable,'setup.py','--version'], cwd=root, capture_output=True, text=True)
    assert out.stdout.split()[-1]==cfg['version']==mgmt_fast.__version__, out.stderr
    assert f"\nversion: {cfg['version']}\n" in (root/'CITATION.cff').read_text(encoding='utf-8')
    assert cfg['version'] in (root/'CHANGELOG.md').read_text(encoding='utf-8')


def test_run_time_requirements_stay_open():
    "A machine with newer libraries must be able to install the package without replacing them"
    assert not [o for o in cfg['requirements'].split() if re.search('[<~]|==', o)]


def test_every_command_answers_help(tmp_path):
    "Called as the installed scripts call them, one import for all"
    script = tmp_path/'run.py'
    script.write_text("""
import sys, importlib
for name,where in (o.split('=') for o in sys.argv[1:]):
    mod,func = where.split(':')
    sys.argv = [name,'--help']
    print('##', name, flush=True)
    try: getattr(importlib.import_module(mod), func)()
    except SystemExit as e: assert not e.code, name
    else: raise AssertionError(name)
""")
    r = subprocess.run([sys.executable,script,*map('='.join, scripts.items())], cwd=tmp_path, capture_output=True,
        text=True, timeout=300)
    assert r.returncode==0, r.stderr
    assert 'Warning' not in r.stderr, r.stderr
    for name,text in zip(scripts, r.stdout.split('## ')[1:], strict=True):
        assert text.startswith(name) and f'usage: {name}' in text and len(text)>300, text


def test_readme_is_the_index_notebook(tmp_path):
    for o in ('.ci','nbs'): shutil.copytree(root/o, tmp_path/o, symlinks=True)
    subprocess.run([sys.executable,tmp_path/'.ci'/'readme.py'], check=True, timeout=300)
    assert (tmp_path/'README.md').read_text(encoding='utf-8')==(root/'README.md').read_text(encoding='utf-8')


def test_modules_are_those_of_the_notebooks():
    made = {re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(map(source, cells(p))), re.M)[1] for p in rooms}
    assert {p.stem for p in modules}-{'__init__','_modidx'}==made
    for p in modules:
        if not p.stem.startswith('_'): assert 'AUTOGENERATED' in p.read_text(encoding='utf-8')[:200]


@pytest.mark.parametrize('nb', rooms, ids=ids(rooms))
def test_a_room_imports_only_lower_rooms(nb):
    number = {p.stem.split('_',1)[1]: p.stem for p in rooms}
    tree = ast.parse((root/'mgmt_fast'/f"{nb.stem.split('_',1)[1]}.py").read_text(encoding='utf-8'))
    used = {o.module.split('.')[1] for o in ast.walk(tree) if isinstance(o, ast.ImportFrom) and not o.level
        and (o.module or '').startswith('mgmt_fast.')}
    used |= {o.module.split('.')[0] for o in ast.walk(tree) if isinstance(o, ast.ImportFrom) and o.level and o.module}
    assert not {o for o in used if number.get(o, o)>=nb.stem}


@pytest.mark.parametrize('nb', notebooks, ids=ids(notebooks))
def test_notebooks_open_and_close_alike(nb):
    cs = cells(nb)
    assert re.match(r'# \S', source(cs[0])) and re.search(r'^> \S', source(cs[0])+'\n'+source(cs[1]), re.M)
    if nb in rooms: assert source(cs[-1])=='#| hide\nimport nbdev; nbdev.nbdev_export()'


@pytest.mark.parametrize('nb', notebooks, ids=ids(notebooks))
def test_imports_have_cells_of_their_own(nb):
    "The site's builder runs whole cells that import; code beside an import would run there, without its data"
    for c in cells(nb):
        if c['cell_type']!='code' or 'nbdev_export()' in source(c) or re.match(r'#\|\s*(export|exporti|exports)\b',
            source(c)) or source(c).startswith('%'):
            continue
        kinds = {type(o) for o in ast.walk(ast.parse(re.sub(r'^[%!].*$', '', source(c), flags=re.M)))}
        assert not (kinds & {ast.Import,ast.ImportFrom} and kinds & {ast.Expr,ast.Assign}), source(c)


@pytest.mark.parametrize('nb', notebooks+kernels, ids=ids(notebooks)+[p.parent.name for p in kernels])
def test_outputs_are_small_clean_and_tell_no_places(nb):
    assert nb.stat().st_size<2**20
    for kind,text in outputs(nb):
        assert kind not in ('stderr','error'), text[:500]
        assert not re.search(r'\w*Warning\b', text), text[:500]
        assert not re.search(r'(?<![\w.])/(root|work|home|tmp|Users|private|var)/', text), text[:500]


@pytest.mark.parametrize('path', texts, ids=[str(p.relative_to(root)) for p in texts])
def test_no_file_names_a_registry_or_an_absolute_place(path):
    try: text = path.read_text(encoding='utf-8')
    except UnicodeDecodeError: return
    hosts = ['.'.join(o) for o in (('pypi','org'),('pythonhosted','org'),('anaconda','org'),('npmjs','org'),
        ('download','pytorch','org'))]
    places = [f'/{o}/' for o in ('work','root')]
    assert not [o for o in hosts+places if o in text]


@pytest.mark.parametrize('path', [p for p in modules if not p.stem.startswith('_')],
    ids=ids([p for p in modules if not p.stem.startswith('_')]))
def test_nothing_users_load_is_unpickled(path):
    for o in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(o, (ast.Import,ast.ImportFrom)):
            assert not {a.name.split('.')[0] for a in o.names} & {'joblib','dill','cloudpickle','shelve'}
        if not isinstance(o, ast.Call): continue
        name,kw = ast.unparse(o.func),{k.arg: ast.unparse(k.value) for k in o.keywords}
        assert name not in ('pickle.load','pickle.loads','pickle.Unpickler','pd.read_pickle','joblib.load',
            'load_learner','exec','eval'), name
        if name in ('torch.load','load_state_dict_from_url'): assert kw.get('weights_only')=='True', ast.unparse(o)
        if name=='np.load': assert kw.get('allow_pickle','False')=='False'


def test_site_has_one_configuration():
    link = root/'nbs'/'_quarto.yml'
    assert link.is_symlink() and str(link.readlink())=='../_quarto.yml'
    assert all(o in link.read_text(encoding='utf-8')
        for o in ('type: website','metadata-files: [nbdev.yml, sidebar.yml]'))


def test_flags_and_marks_are_the_same():
    assert set(cfg['tst_flags'].split())=={'real','slow','cuda'}
    for nb in notebooks:
        for c in cells(nb):
            for o in re.findall(r'^#\|\s*(real|slow|cuda)\b(.*)$', source(c), re.M): assert not o[1].strip()
