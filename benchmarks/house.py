"""How the code reads, in numbers: one row per room (module), and one for the total.

usage: house.py [FOLDER ...] [--width 120]      FOLDER: a package, by default mgmt_fast beside this script's folder

lines, p90      lines of a function: median, and the 90th percentile
nodes           syntax nodes per line of a function's body, docstring left out: median over functions
>120 %, >140 %  share of lines that are longer
public, private names that the module defines at its top level (`__all__`-like names with underscores left out)
borrowed        private names that are imported from other rooms"""
import argparse, ast
from pathlib import Path

import numpy as np, pandas as pd

here = Path(__file__).resolve().parent.parent/'mgmt_fast'


def functions(tree):
    "All functions and methods, nested ones too"
    return [o for o in ast.walk(tree) if isinstance(o, (ast.FunctionDef,ast.AsyncFunctionDef))]


def body(func):
    "The statements of a function after its docstring"
    return func.body[1:] if ast.get_docstring(func, clean=False) is not None else func.body


def density(func):
    "Syntax nodes per line of the body; None where there is only a docstring"
    rest = body(func)
    if not rest: return None
    lines = rest[-1].end_lineno-rest[0].lineno+1
    return sum(1 for o in rest for _ in ast.walk(o))/lines


def is_patched(o):
    "Is it a method that is put into its class from outside?"
    return any('patch' in ast.unparse(d) for d in o.decorator_list)


def defined(tree):
    "Names that a module defines at its top level: functions, classes and variables; a patched method is its class'"
    names = []
    for o in tree.body:
        made = isinstance(o, (ast.FunctionDef,ast.ClassDef))
        if made and not is_patched(o): names.append(o.name)
        if not isinstance(o, (ast.Assign,ast.AnnAssign)): continue
        targets = o.targets if isinstance(o, ast.Assign) else [o.target]
        for t in targets: names += stored(t)
    return {o for o in names if not o.startswith('__')}


def stored(target):
    "Names that an assignment writes to"
    return [o.id for o in ast.walk(target) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)]


def borrowed(tree, package):
    "Private names imported from other modules of the package"
    def ours(o): return isinstance(o, ast.ImportFrom) and (o.level or (o.module or '').startswith(package))
    names = [a.name for o in ast.walk(tree) if ours(o) for a in o.names]
    return [o for o in names if o.startswith('_') and not o.startswith('__')]


def read(path):
    "What one module holds: numbers of each function, lengths of lines, names"
    text = path.read_text(encoding='utf-8')
    tree = ast.parse(text)
    own = functions(tree)
    return dict(lines=[o.end_lineno-o.lineno+1 for o in own], nodes=[d for o in own if (d := density(o)) is not None],
        widths=[len(o) for o in text.splitlines()], names=defined(tree), borrowed=borrowed(tree, path.parent.name))


def row(parts, width):
    "One line of the table, of one module or of several"
    lines,nodes,widths = (np.array(sum((o[k] for o in parts), [])) for k in ('lines','nodes','widths'))
    names = [n for o in parts for n in o['names']]
    private = sum(n.startswith('_') for n in names)
    over = {f'>{w} %': 100*np.mean(widths>w) if len(widths) else 0. for w in (width, width+20)}
    some = dict(functions=len(lines))
    if len(lines): some |= dict(lines=np.median(lines), p90=np.quantile(lines, .9), nodes=np.median(nodes))
    whole = dict(public=len(names)-private, private=private, borrowed=sum(len(o['borrowed']) for o in parts))
    return {**some, **over, **whole}


def house(
    folder, # Of a package
    width=120, # Lines may have so many characters
):
    "The table, as a DataFrame"
    paths = [p for p in sorted(Path(folder).rglob('*.py')) if p.name!='_modidx.py']
    rooms = {p.stem: read(p) for p in paths}
    table = {k: row([v], width) for k,v in rooms.items()}
    table['total'] = row(list(rooms.values()), width)
    whole = ['functions','public','private','borrowed']
    t = pd.DataFrame(table).T
    return t.astype({c: 'Int64' for c in whole})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='*', default=[here], help='packages; mgmt_fast if none')
    p.add_argument('--width', type=int, default=120, help='characters in a line')
    o = p.parse_args()
    for folder in o.folder:
        print(Path(folder).name)
        print(house(folder, o.width).to_string(float_format='{:.1f}'.format, na_rep=''), '\n')


if __name__=='__main__': main()
