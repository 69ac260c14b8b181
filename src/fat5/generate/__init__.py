"""Generation: our decoding loop, its step, and the completion of texts."""

from typing import TYPE_CHECKING

from fat5.lazy import lazy

if TYPE_CHECKING:
    from fat5.generate.completion import Completion as Completion
    from fat5.generate.completion import complete as complete
    from fat5.generate.config import Decoding as Decoding
    from fat5.generate.decoding import Decoder as Decoder
    from fat5.generate.decoding import generate as generate

__getattr__, __dir__ = lazy(__name__, __file__)
