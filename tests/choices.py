"Other values of a recipe's choices, for tests that go through all of them."
from mgmt_fast.core import MGMTError, check_choice, get_recipe

CANDIDATES = ['other', True, False, None, 1, 2, 3, .25, .75, 7., (1,2,3), (.25,.75), (.5,), ('T1wCE',), 'T1wCE', 'flat',
    'steps', 'slice', 'patient',
    'position', 'filename', 'middle', 'spread', 'replace', 'keep', 'none', 'zeros', 'stretch', 'border', 'reflection',
    'gaussian', 'brain', 'code',
    'focal', 'balanced', 'ema', 'swa', 'bf16', 'frozen', 'group', 'siamese', '2d', 'adapter', 'all', 'batchnorm', 'w',
    'h', 'published', 'plain', 'sum', 'raw', 'bytes', 'full', 'replicate', 'backbone', 'input', 'keras', 'torch',
    'separable']


def other_value(choice, value):
    "A value that the choice takes and that is not `value`."
    for o in CANDIDATES:
        try: found = check_choice(choice, o)
        except MGMTError: continue
        if found!=value: return found
    raise AssertionError(f'no other value of {choice} than {value!r} among the candidates')
