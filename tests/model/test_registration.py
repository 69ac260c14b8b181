"""`import fat5` registers models and attention with transformers, in either order, and is light until then."""

import subprocess
import sys
from pathlib import Path

import pytest

from fat5.model import FAT5Config, FAT5ForConditionalGeneration

SIZES = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2)
SLOW = pytest.mark.slow
ORDERS = {
    "fat5 first": "import fat5; assert not {'torch', 'transformers'} & sys.modules.keys(); import transformers",
    "transformers first": "import transformers; import fat5",
    "looked for in between": "import fat5, importlib.util as i; i.find_spec('transformers'); import transformers",
    "a part of transformers": "import fat5; from transformers.models.t5 import modeling_t5; import transformers",
    "a part of fat5": "import fat5.data; import transformers",
}


@pytest.mark.parametrize(
    "order", [next(iter(ORDERS)), *(pytest.param(order, marks=SLOW) for order in list(ORDERS)[1:])]
)
def test_in_any_order(order: str, tmp_path: Path) -> None:
    FAT5ForConditionalGeneration(FAT5Config(**SIZES, position_encoding="alibi")).save_pretrained(tmp_path / "alibi")
    FAT5ForConditionalGeneration(FAT5Config(**SIZES)).save_pretrained(tmp_path / "t5")
    script = f"""
import sys
{ORDERS[order]}
folder = {str(tmp_path)!r}
assert transformers.AutoConfig.from_pretrained(folder + "/alibi").position_encoding == "alibi"
ours = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder + "/alibi")
assert type(ours).__module__ == "fat5.model.seq2seq"
stock = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder + "/t5", attn_implementation="fat5")
assert type(stock).__module__ == "transformers.models.t5.modeling_t5"
assert not any(type(finder).__module__ == "fat5.registration" for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
