"The app as somebody uses it: its one socket, what it refuses, what it keeps to itself, and a browser that clicks."
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

import psutil
import pydicom
import pytest

from identifiers import FOLDER, found, found_in, plant_slice
from mgmt_fast.cohort import find_cohort
from mgmt_fast.learner import predict
from mgmt_fast.phantom import make_phantom
from mgmt_fast.series import read_volume
from mgmt_fast.skull import has_skull
from test_standardize import engines
from test_patient_page import work # a phantom, a model and a bundle

ROOT = Path(__file__).resolve().parent.parent
RUN = "import sys; from mgmt_fast.app import mgmt_app; sys.argv[0] = 'mgmt_app'; sys.exit(mgmt_app())"
WATCH = """
import os, sys
fd = os.open(os.environ['SOCKETS'], os.O_WRONLY|os.O_APPEND|os.O_CREAT)
def hook(event, args):
    if event in ('socket.bind','socket.connect','socket.getaddrinfo','socket.sendto'):
        os.write(fd, f'{event} {args[1:]}\\n'.encode())
sys.addaudithook(hook)
"""


class Launched:
    "An app in a process of its own; what its sockets do is in `sockets`"
    def __init__(self, where, *args):
        where.mkdir(parents=True, exist_ok=True)
        (where/'sitecustomize.py').write_text(WATCH)
        self.where,self.sockets,start = where,where/'sockets.txt',time.monotonic()
        (where/'tmp').mkdir(exist_ok=True)
        env = {**os.environ, 'PYTHONPATH':f'{where}{os.pathsep}{ROOT}', 'SOCKETS':str(self.sockets),
            'TMPDIR':str(where/'tmp'), 'MGMT_FAST_LOG':str(where/'faults.log')}
        env.pop('DISPLAY', None)
        command = [sys.executable,'-c',RUN,*map(str, args),'--no-browser']
        self.process = subprocess.Popen(command, env=env, cwd=where, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        self.address,self.hint = (self.process.stdout.readline().strip() for _ in range(2))
        url = urlsplit(self.address)
        self.base,self.token,self.cookie = f'http://{url.netloc}',parse_qs(url.query)['token'][0],f'mgmt_app_{url.port}'
        self.ask('/')
        self.seconds = time.monotonic()-start

    def ask(self, path, what=None, cookie=None, **headers):
        "Code, headers and text of an answer; a POST where there is something to tell"
        headers = {'Cookie':f'{self.cookie}={cookie or self.token}', **headers}
        body = what if what is None or isinstance(what, bytes) else json.dumps(what).encode()
        if body is not None: headers = {'Origin':self.base, **headers}
        try: r = urlopen(Request(self.base+path, body, {k.replace('_','-'):v for k,v in headers.items() if v}))
        except HTTPError as e: r = e
        return r.status,r.headers,r.read().decode(errors='replace')

    def tell(self, path, what=None):
        "What the app says to a POST"
        return json.loads(self.ask(path, what or {})[2])

    def start(self, path): return self.tell('/start', dict(path=str(path)))['to']

    def until(self, run, text, seconds=120):
        "A run's page, as soon as it says something"
        end = time.monotonic()+seconds
        while time.monotonic()<end:
            said = self.ask(f'{run}/part')[2]
            if re.search(text, said): return said
            time.sleep(.1)
        raise AssertionError(f'{text!r} is not in: {said}')

    def children(self): return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, how=signal.SIGTERM):
        "What it said after its address"
        self.process.send_signal(how)
        return self.process.communicate(timeout=30)[0]


@pytest.fixture(scope='module')
def scans(work, tmp_path_factory):
    "What somebody may choose: one patient, two, many; nothing, a file, CT, a patient without a sequence"
    d,source = tmp_path_factory.mktemp('scans'),work/'scans/train'
    shutil.copytree(source/'00003', d/'one/00003')
    for o in ('00004','00005'): shutil.copytree(source/o, d/'two'/o)
    for i in range(12): shutil.copytree(source/f'{i:05}', d/f'many/{i:05}')
    shutil.copytree(source/'00006', d/'lacking/00006', ignore=shutil.ignore_patterns('T1wCE'))
    shutil.copytree(source/'00007', d/'ct/00007')
    for o in (d/'ct').rglob('*.dcm'):
        ds = pydicom.dcmread(o)
        ds.Modality,ds.SOPClassUID = 'CT',pydicom.uid.CTImageStorage
        ds.save_as(o)
    (d/'nothing').mkdir()
    (d/'nothing/notes.txt').write_text('x')
    return d


@pytest.fixture(scope='module')
def app(work, scans, tmp_path_factory):
    launched = Launched(tmp_path_factory.mktemp('app'), work/'bundle', '--root', scans)
    yield launched
    if launched.process.poll() is None: launched.end()


def number_of(work, folder): return f"{predict(work/'bundle', find_cohort(folder), progress=False).prob.item():.2f}"


def gone(processes): return not psutil.wait_procs(processes, timeout=10)[1]


def test_it_starts_in_time_and_answers_who_holds_the_token(app):
    assert app.seconds<8
    assert app.ask('/')[0]==200 and app.ask('/', cookie='x'*43)[0]==403 and app.ask('/runs', cookie='é')[0]==403
    code,headers,text = app.ask(f'/?token={app.token}', cookie='none')
    assert code==200 and 'HttpOnly; SameSite=Strict' in headers['Set-Cookie'] and app.token not in text
    assert "default-src 'none'" in headers['Content-Security-Policy'] and 'unsafe-inline' not in re.search(
        'script-src[^;]*', headers['Content-Security-Policy'])[0]
    assert headers['Referrer-Policy']=='no-referrer' and headers['Cache-Control']=='no-store'
    assert app.ask('/?token=wrong', cookie='none')[0]==403


def test_another_name_of_this_host_and_another_site_are_refused(app):
    assert app.ask('/', Host='rebound.example:80')[0]==403
    for origin in ('http://elsewhere.example', 'null', '', f'{app.base}.example'):
        assert app.ask('/start', dict(path='one'), Origin=origin)[0]==403, origin
    assert 'There is no run yet' in app.ask('/runs')[2]


@pytest.mark.parametrize('path', ['..','../..','/etc','one/../..','~root','one\0','/proc/self/root','x'*5000])
def test_nothing_outside_the_root_is_read(app, path):
    for to,key in (('/folders','at'),('/start','path')):
        code,_,said = app.ask(to, {key:path})
        assert code==404 and 'no such folder' in said.lower() and str(path) not in said


@pytest.mark.parametrize('path', ['/run/1/0/../../patient.json','/run/9/0/report.html','/app.js/..','/etc/passwd','/x',
    '/run/1/999999999/report.html','/run/-1','/%2e%2e/%2e%2e/etc/passwd'])
def test_no_file_is_served_but_pages(app, path): assert app.ask(path)[0]==404


@pytest.mark.parametrize('body', [b'', b'[]', b'{"path":1}', b'{"path":'+b'['*100000, b'\xff', b'null'])
def test_what_is_no_request_is_one_sentence(app, body):
    code,_,said = app.ask('/start', body)
    assert code==400 and 'not of this app' in json.loads(said)['what']


@pytest.mark.parametrize('folder,say', [('nothing','This folder'),('ct','This folder'),
    ('nothing/notes.txt','is a file'),('lacking','lacks T1wCE')])
def test_a_folder_that_cannot_be_used_is_a_sentence(app, scans, folder, say):
    answer = app.tell('/start', dict(path=folder))
    if 'what' in answer: assert say in answer['what']
    else: assert say in app.until(answer['to'], f'Ended|Done').replace('&#39;', "'")
    assert str(scans) not in app.ask('/runs')[2] and app.ask('/')[0]==200


def test_two_clients_see_the_same_and_the_number_is_that_of_predict(app, work, scans):
    run = app.start(scans/'one')
    assert app.start('one/')==run, 'one folder is one run'
    said = app.until(run, 'Done: 1 of 1')
    assert number_of(work, scans/'one') in said and said==app.ask(f'{run}/part')[2]
    assert '00003' in app.ask('/runs')[2]
    code,headers,page = app.ask(f'{run}/0/report.html')
    assert code==200 and 'Probability of a methylated' in page and 'script' not in headers['Content-Security-Policy']
    assert app.ask(f'{run}/0/report.pdf')[2].startswith('%PDF')
    code,headers,viewer = app.ask(f'{run}/0/viewer.html')
    assert 'mgmt-view' in viewer and headers['Content-Security-Policy'].startswith('sandbox allow-scripts;')


def test_a_cancelled_run_keeps_what_is_done_and_goes_on(app):
    run = app.start('many')
    app.until(run, '[1-9] of 12 patients done')
    working = app.children()
    app.tell(run.replace('run','cancel'))
    said = app.ask(f'{run}/part')[2]
    assert 'Cancelled' in said and 'Go on' in said and gone(working)
    done = said.count('report.html')
    assert done and app.tell(run.replace('run','again'))['to']==run
    first = app.until(run, 'Running: [1-9]')
    assert first.count('report.html')>=done
    app.tell(run.replace('run','cancel'))


def listed(folder, top):
    files = [o for o in sorted(folder.rglob('*')) if o.is_file()]
    return files,[[f'{top}/{o.relative_to(folder).as_posix()}', o.stat().st_size] for o in files]


def test_dropped_files_are_kept_safely_and_run(app, work, scans):
    files,names = listed(scans/'two/00004', '00004')
    new = app.tell('/upload', dict(files=names))
    assert len(new['missing'])==len(files)
    for i in new['missing'][:-1]: assert app.tell(f"/upload/{new['upload']}/{i}", files[i].read_bytes())=={}
    assert 'ot all files' in app.tell(f"/upload/{new['upload']}/start")['what'], 'a browser that was closed half-way'
    assert app.tell('/upload', dict(files=names))['missing']==[len(files)-1]
    assert 'has changed' in app.tell(f"/upload/{new['upload']}/{len(files)-1}", b'x')['what']
    app.tell(f"/upload/{new['upload']}/{len(files)-1}", files[-1].read_bytes())
    said = app.until(app.tell(f"/upload/{new['upload']}/start")['to'], 'Done: 1 of 1')
    assert number_of(work, scans/'two/00004') in said and '00004' in said


@pytest.mark.parametrize('files,say', [([['../x.dcm',1]],'cannot be kept'), ([['/etc/x',1]],'cannot be kept'),
    ([['a\\b',1]],'cannot be kept'), ([['\ud800',1]],'cannot be kept'), ([],'no file'), ([['a',-1]],'no list'),
    ([['a']],'no list'), ([[f'ct/{i}.dcm',500_000] for i in range(4000)],'is this CT'),
    ([['a/b',1e400]],'no list'), ([[f'x/{i}',1] for i in range(60000)],'60000 files')])
def test_a_drop_that_cannot_be_taken_is_refused_before_a_byte_is_sent(app, files, say):
    assert say in app.tell('/upload', dict(files=files))['what']


def test_one_socket_and_no_other(app):
    processes = [psutil.Process(app.process.pid), *app.children()]
    listening = [o.laddr for p in processes for o in p.net_connections('inet') if o.status=='LISTEN']
    assert [(o.ip,o.port) for o in listening]==[('127.0.0.1', urlsplit(app.base).port)]
    events = app.sockets.read_text().splitlines()
    assert events.pop(0)=="socket.bind (('127.0.0.1', 0),)"
    assert set(events)<={"socket.bind (('::1', 0),)"}, 'urllib3 asks once, when it is imported, whether there is IPv6'


def test_what_a_killed_app_left_is_ended_and_wiped(work, scans, tmp_path):
    app = Launched(tmp_path/'app', work/'bundle', '--root', scans)
    app.until(app.start('one'), 'Done')
    working = app.children()
    app.end(signal.SIGKILL)
    assert working and gone(working) and len(list((tmp_path/'app/tmp').glob('mgmt-app-*')))==1
    app = Launched(tmp_path/'app', work/'bundle', '--root', scans)
    left, = (tmp_path/'app/tmp').iterdir()
    assert f'-{app.process.pid}-' in left.name
    said = app.end(signal.SIGINT)
    assert app.process.returncode==0 and 'wiped' in said and not list((tmp_path/'app/tmp').iterdir())


def test_what_is_kept_goes_on_and_names_no_place(work, scans, tmp_path):
    root = tmp_path/FOLDER
    shutil.copytree(scans/'two', root/'two')
    for o in root.rglob('*.dcm'): plant_slice(o)
    said = ''
    for turn in range(2):
        app = Launched(tmp_path/'app', work/'bundle', '--root', root, '--keep', tmp_path/'kept')
        start = time.monotonic()
        run = app.start('two')
        page = app.until(run, 'Done: 2 of 2')
        said += page+app.ask('/runs')[2]+app.ask(run)[2]+app.end()
        times = [o.stat().st_mtime for o in sorted((tmp_path/'kept').rglob('patient.json'))]
        if turn: assert times==before and len(times)==2
        before = times
    assert 'kept where --keep says' in said and not found(said.encode())
    assert not found_in(tmp_path/'kept') and 'identifiers in the header' in ''.join(
        o.read_text() for o in (tmp_path/'kept').rglob('report.html'))
    kept = b''.join(o.read_bytes() for o in (tmp_path/'kept').rglob('*') if o.is_file())
    assert str(root).encode() not in kept and not (tmp_path/'app/faults.log').exists()


def test_a_head_without_an_atlas_has_no_number(work, tmp_path):
    make_phantom(tmp_path/'heads', n=2, test=0., seed=3, slices=24, size=64, skull=True, progress=False, n_workers=0)
    app = Launched(tmp_path/'app', work/'bundle', '--root', tmp_path/'heads')
    said = app.until(app.start(tmp_path/'heads/train/00000'), 'Done: 1 of 1')
    assert 'FLAIR, T1wCE with skull' in said and 'none<' in said.replace('\n', '') and 'class="number"' not in said
    app.end()


@pytest.mark.slow
@pytest.mark.real
@engines
def test_a_real_head_is_brought_into_the_atlas_and_judged(work, data, tmp_path):
    "A patient as scanned: no number without an atlas, and with one that of `predict` for what was brought there"
    raw,atlas = data/'tcga_lgg_raw',data/'atlas/sri24/sri24_t1_1mm_skull_stripped.nii.gz'
    without = predict(work/'bundle', find_cohort(raw, labels=False), progress=False)
    assert without.prob.isna().all() and 'with skull' in without.note[0]
    app = Launched(tmp_path/'app', work/'bundle', '--root', raw, '--keep', tmp_path/'kept', '--atlas', atlas)
    run = app.start(raw)
    app.until(run, 'bringing into the atlas TCGA-FG-6692', 300)
    said = app.until(run, 'Done: 1 of 1', 500)
    app.end()
    brought, = (tmp_path/'kept/pages/atlas').iterdir()
    there = find_cohort(brought, labels=False)
    number = predict(work/'bundle', there, progress=False).prob.item()
    assert f'<span class="number">{number:.2f}</span>' in said
    kept = json.loads(next((tmp_path/'kept/pages').glob('*/patient.json')).read_text())
    assert kept['prob']==pytest.approx(number, abs=1e-6) and not has_skull(read_volume(there.FLAIR[0]))
    assert any('brought into the atlas' in o[2] for o in kept['findings'])


@pytest.mark.parametrize('args,say', [(['nowhere'],'no model at this place'),
    (['.','--atlas','x.nii'],'--atlas is no file'),
    (['.','--root','x'],'--root is no folder'), (['.','--port','99999'],'port 99999')])
def test_what_cannot_start_is_one_sentence(tmp_path, args, say):
    env = {**os.environ, 'PYTHONPATH':str(ROOT), 'TMPDIR':str(tmp_path)}
    command = [sys.executable,'-c',RUN,*args,'--no-browser']
    r = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert r.returncode==2 and r.stderr.startswith('error: ') and say in r.stderr and len(r.stderr.splitlines())==1
    assert not list(tmp_path.iterdir())


def test_a_model_of_a_later_version_is_said_on_the_page(work, scans, tmp_path):
    for o in work.glob('model.*'): shutil.copy(o, tmp_path)
    path = tmp_path/'model.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'later':1}))
    app = Launched(tmp_path/'app', tmp_path/'model', '--root', scans)
    assert 'later' in app.until(app.start('one'), 'The model cannot be used')
    app.end()


@pytest.fixture(scope='module')
def browser():
    "A Chromium that reaches this machine alone"
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    where = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    with sync_api.sync_playwright() as p:
        where = where or p.chromium.executable_path
        if not Path(where).exists(): pytest.skip('there is no Chromium')
        rules = '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'
        started = p.chromium.launch(executable_path=where, args=['--no-sandbox',rules])
        yield started
        started.close()


@pytest.fixture
def window(app, browser):
    "A window with the app's page; at the end, that it asked nobody else and complained of nothing"
    context,asked,said = browser.new_context(),[],[]
    context.on('request', lambda r: asked.append(r.url))
    context.on('console', lambda m: said.append(m.text) if m.type=='error' else None)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(app.address)
    yield page
    assert not [o for o in asked if not o.startswith((app.base,'data:'))]
    assert not [o for o in said if 'status of 4' not in o], said
    context.close()


def choose(page, path):
    page.get_by_label('Path of a patient').fill(path)
    page.get_by_role('button', name='Run', exact=True).click()


def test_choose_run_read_the_number_and_open_the_viewer(window, app, work, scans):
    assert 'token' not in window.url
    window.get_by_role('button', name='Look inside').click()
    window.get_by_role('button', name='one', exact=True).click()
    window.get_by_text('Folders: 1, files: 0').wait_for()
    assert window.get_by_label('Path of a patient').input_value()=='one'
    window.get_by_role('button', name='Run', exact=True).click()
    window.get_by_text('Done: 1 of 1 patient done').first.wait_for()
    assert window.locator('.number').inner_text()==number_of(work, scans/'one')
    with window.context.expect_page() as opened: window.get_by_role('link', name='page of 00003').click()
    assert 'patient 00003' in opened.value.get_by_role('heading', level=1).inner_text()
    with window.context.expect_page() as opened: window.get_by_role('link', name='viewer of 00003').click()
    viewer = opened.value
    viewer.locator('canvas').nth(11).wait_for()
    before = viewer.locator('.place').inner_text()
    viewer.get_by_label('up').fill('3')
    assert viewer.locator('.place').inner_text()!=before, 'its script runs, shut off from the app'
    assert viewer.evaluate('origin')=='null'


def test_cancel_and_go_on(window, app):
    choose(window, 'many')
    window.get_by_role('link', name='page of 00001').wait_for()
    window.get_by_role('button', name='Cancel').click()
    window.get_by_text('Cancelled:').wait_for()
    window.get_by_role('button', name='Go on').click()
    window.get_by_text('Running:').wait_for()
    assert window.get_by_role('link', name='page of 00001').is_visible()
    window.get_by_role('button', name='Cancel').click()
    window.get_by_text('Cancelled:').wait_for()


@pytest.mark.parametrize('path,say', [('absent','no such folder'), ('nothing/notes.txt','is a file'),
    ('../..','no such folder')])
def test_a_wrong_path_is_said_and_nothing_is_left(window, path, say):
    choose(window, path)
    window.get_by_role('alert').filter(has_text=say).wait_for()
    assert urlsplit(window.url).path=='/' and window.get_by_label('Path of a patient').input_value()==path


def test_a_folder_without_scans_is_said(window):
    choose(window, 'ct')
    assert 'This folder' in window.get_by_role('alert').inner_text()
    window.get_by_role('link', name='All runs').click()
    window.get_by_role('table').get_by_text('This folder').first.wait_for()


def test_two_windows_see_one_run_and_closing_one_loses_nothing(window, app, browser, work, scans):
    choose(window, 'two')
    other = browser.new_context().new_page()
    other.goto(app.address)
    other.get_by_role('link', name='00004 and 00005').click()
    run = urlsplit(window.url).path
    window.goto('about:blank')
    other.get_by_text('Done: 2 of 2').wait_for(timeout=60_000)
    window.goto(app.base+run)
    texts = [o.locator('[data-from]').inner_text() for o in (other,window)]
    assert texts[0]==texts[1] and number_of(work, scans/'two/00004') in texts[0]
    other.context.close()


def test_a_folder_is_dropped(window, work, scans):
    window.locator('#files').set_input_files(scans/'two/00005')
    window.wait_for_url('**/run/*')
    window.get_by_text('Done: 1 of 1 patient done').first.wait_for()
    assert number_of(work, scans/'two/00005')==window.locator('.number').inner_text()


def drop(page, *paths):
    "Drag files and folders over the page and let go, as Chromium itself tells a page of a drop"
    page.locator('#drop').scroll_into_view_if_needed()
    box,cdp = page.locator('#drop').bounding_box(),page.context.new_cdp_session(page)
    at = dict(x=box['x']+box['width']/2, y=box['y']+10)
    data = dict(items=[], files=[str(o) for o in paths], dragOperationsMask=1)
    for kind in ('dragEnter','dragOver'): cdp.send('Input.dispatchDragEvent', dict(type=kind, data=data, **at))
    over = 'over' in (page.locator('#drop').get_attribute('class') or '')
    cdp.send('Input.dispatchDragEvent', dict(type='drop', data=data, **at))
    return over


def test_a_folder_is_dragged_and_dropped(window, app, work, scans):
    assert drop(window, scans/'two/00004'), 'the field shows that it would take the folder'
    window.wait_for_url('**/run/*')
    window.get_by_text('Done: 1 of 1 patient done').first.wait_for()
    assert number_of(work, scans/'two/00004')==window.locator('.number').inner_text()


def test_series_are_dropped_side_by_side(window, app, work, scans):
    "More folders than one are one patient's series, below a folder of their own"
    drop(window, *sorted((scans/'two/00005').iterdir()))
    window.wait_for_url('**/run/*')
    window.get_by_text('Done: 1 of 1 patient done').first.wait_for()
    assert number_of(work, scans/'two/00005')==window.locator('.number').inner_text()


def test_a_drop_beside_the_field_leaves_the_page_as_it_is(window, app, scans):
    cdp = window.context.new_cdp_session(window)
    data = dict(items=[], files=[str(scans/'two/00004')], dragOperationsMask=1)
    for kind in ('dragEnter','dragOver','drop'):
        cdp.send('Input.dispatchDragEvent', dict(type=kind, data=data, x=5, y=5))
    window.wait_for_timeout(300)
    assert urlsplit(window.url).path=='/' and window.get_by_role('button', name='Run', exact=True).is_visible()


def test_too_much_is_said_before_it_is_sent(window, tmp_path):
    (tmp_path/'ct').mkdir()
    with open(tmp_path/'ct/1.dcm', 'wb') as f: f.truncate(2*10**9)
    window.locator('#files').set_input_files(tmp_path/'ct')
    window.get_by_role('alert').filter(has_text='is this CT').wait_for()


def test_without_the_token_a_window_shows_where_it_is(app, browser):
    page = browser.new_page()
    page.goto(app.base)
    assert 'Open the whole address' in page.get_by_role('main').inner_text()
    page.close()


def test_closing_ends_and_wipes_everything(app):
    "The last test of this app"
    app.until(app.start('many'), '[1-9][0-9]* of 12 patients done')
    working = app.children()
    private, = (app.where/'tmp').iterdir()
    assert working and private.stat().st_mode&0o077==0
    said = app.end()
    assert app.process.returncode==0 and said.endswith('closed: pages and dropped files were wiped\n')
    assert said.count('\n')==1 and gone(working) and not private.exists()
