"""Draw nbs/images/app.png: the app's page of a run with phantoms, as a headless Chromium shows it.

usage: PYTHONPATH=.:tests python .ci/app_picture.py [--chromium /usr/bin/chromium]
Needs playwright, and a Chromium."""
import argparse, io, re, shutil, tempfile, threading
from contextlib import redirect_stdout
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright
from bundles import pair_bundle
from mgmt_fast.app import App

root = Path(__file__).parent.parent


def choose_scans(d):
    "Four patients: two as they should be, one whose T2w is damaged, one who lacks T1wCE"
    for name in ('00003','00004','00005'): shutil.copytree(d/'scans/train'/name, d/'chosen'/name)
    damaged = sorted((d/'chosen/00005/T2w').iterdir())[5]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    shutil.copytree(d/'scans/train/00006', d/'chosen/00006', ignore=shutil.ignore_patterns('T1wCE'))


def draw(app, chromium):
    "The page of the run, as PNG"
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=900, height=600), color_scheme='light')
        page.set_default_timeout(120_000)
        page.goto(app.server.address)
        page.get_by_label('Path of a patient').fill('chosen')
        page.get_by_role('button', name='Run', exact=True).click()
        page.get_by_text(re.compile('Done: 4 of 4')).wait_for()
        page.wait_for_timeout(1500)
        png = page.screenshot(full_page=True)
        browser.close()
    return png


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--chromium', default=shutil.which('chromium'))
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        d = Path(tmp)
        with redirect_stdout(io.StringIO()): pair_bundle(d, dict(n=48, slices=24, size=64), dict(epochs=6, lr=2e-3))
        choose_scans(d)
        app = App(d/'bundle', d, n_workers=1)
        threading.Thread(target=app.serve, daemon=True).start()
        try: png = draw(app, o.chromium)
        finally:
            app.server.shutdown()
            app.close()
    dest = root/'nbs/images/app.png'
    Image.open(io.BytesIO(png)).convert('RGB').quantize(64).save(dest, optimize=True)
    print(f'{dest.relative_to(root)}: {dest.stat().st_size/1e3:.0f} kB')


if __name__=='__main__': main()
