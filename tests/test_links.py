"Links between the pages hold: those of the site's notebooks, of README and of the other texts."
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted((ROOT/'nbs').glob('*.ipynb'))
PAGES = {re.sub(r'^\d+_', '', p.stem) for p in NBS}
TEXTS = [ROOT/o for o in ('README.md','CONTRIBUTING.md','CHANGELOG.md')]


def prose(nb):
    return '\n'.join(''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells']
        if c['cell_type']=='markdown')


@pytest.mark.parametrize('nb', NBS+sorted((ROOT/'kaggle').glob('*/*.ipynb')), ids=lambda p: p.stem)
def test_links_of_notebooks(nb):
    for to in re.findall(r'\]\(([^)\s]+)\)', prose(nb)):
        if to.startswith(('http://','https://','#','mailto:')): continue
        page,_,_ = to.partition('#')
        assert page.removesuffix('.html') in PAGES if page.endswith('.html') else (nb.parent/page).exists(), to


@pytest.mark.parametrize('text', TEXTS, ids=lambda p: p.name)
def test_links_of_texts(text):
    for to in re.findall(r'\]\(([^)\s]+)\)', text.read_text(encoding='utf-8')):
        if not to.startswith(('http://','https://','#','mailto:')): assert (ROOT/to.partition('#')[0]).exists(), to


def test_the_index_names_every_page():
    said = prose(ROOT/'nbs/index.ipynb')
    assert not [o for o in PAGES-{'index','all'} if f']({o}.html)' not in said]
