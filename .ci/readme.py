"Write README.md from nbs/index.ipynb: its prose, visible code, text outputs, and figures as files in nbs/images."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent
nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
nb.metadata['language_info'] = {'name': 'python'}
nb.cells = [c for c in nb.cells if not c.source.startswith('#| hide')]
for c in nb.cells:
    if '#| echo: false' in c.source: c.source = ''
    c.source = re.sub(r'^#\| .*\n', '', c.source, flags=re.M)
    for o in c.get('outputs', []): o.get('data', {}).pop('text/html', None)
md,res = MarkdownExporter().from_notebook_node(nb)
(root/'nbs/images').mkdir(exist_ok=True)
for i,(name,data) in enumerate(res['outputs'].items()):
    (root/f'nbs/images/readme{i}.png').write_bytes(data)
    md = md.replace(f'![png]({name})', f'![Result](images/readme{i}.png)')
md = md.replace('](images/', '](nbs/images/')
notebooks = {re.sub(r'^\d+_', '', p.stem): p.name for p in (root/'nbs').glob('*.ipynb')}
md = re.sub(r'\]\((\w+)\.html\)', lambda m: f'](nbs/{notebooks[m[1]]})', md)
md = re.sub(r'[ \t]+$', '', md, flags=re.M).replace('```python\n\n```\n', '')
md = re.sub(r'\n{3,}', '\n\n', md).strip()
(root/'README.md').write_text(f'<!-- generated from nbs/index.ipynb; edit that -->\n\n{md}\n', encoding='utf-8')
