"""FAT5 (Flash Attention T5): pretrain, run and convert T5-family encoder-decoder models, fast."""

from typing import TYPE_CHECKING

from fat5.lazy import lazy
from fat5.registration import register_with_transformers

if TYPE_CHECKING:
    from fat5 import data as data
    from fat5 import errors as errors
    from fat5 import generate as generate
    from fat5 import model as model
    from fat5 import ops as ops
    from fat5 import optim as optim
    from fat5 import train as train
    from fat5.model import FAT5Config as FAT5Config
    from fat5.model import FAT5EncoderModel as FAT5EncoderModel
    from fat5.model import FAT5ForConditionalGeneration as FAT5ForConditionalGeneration
    from fat5.model import FAT5ForQuestionAnswering as FAT5ForQuestionAnswering
    from fat5.model import FAT5ForSequenceClassification as FAT5ForSequenceClassification
    from fat5.model import FAT5ForTokenClassification as FAT5ForTokenClassification
    from fat5.stock import accelerate as accelerate

__version__ = "0.1.0"
__getattr__, __dir__ = lazy(__name__, __file__)
register_with_transformers()
