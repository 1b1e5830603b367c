"""What the stand-ins see: rectangles of known colours on white, found in the pixels by the weights.

The weights are a palette: a model whose weights were not loaded finds nothing.
"""

import re
import zlib

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

NAMES = ("red", "green", "blue", "white")
COLOURS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0))
FORBIDDEN = "magenta"
"""An image of this colour is more than a stand-in can bear."""


def tensor_of(image):
    """3 x height x width, 0 to 1, of a PIL image."""
    width, height = image.size
    flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.view(height, width, 3).permute(2, 0, 1).float() / 255


class Eye(nn.Module):
    """Finds colours. ``palette`` is the only weight."""

    def __init__(self):
        super().__init__()
        self.palette = nn.Parameter(torch.zeros(len(NAMES), 3))

    def nearest(self, pixels):
        """Of each pixel, the index of its name."""
        pixels = pixels.to(self.palette)
        if bool(((pixels[0] > 0.9) & (pixels[1] < 0.1) & (pixels[2] > 0.9)).all()):
            raise ValueError("this image is " + FORBIDDEN)
        far = (pixels[:, None] - self.palette.T[:, :, None, None]).abs().sum(0)
        return far.argmin(0)

    def box(self, pixels, words):
        """x1, y1, x2, y2 as parts of the image, of what the words name by its colour; or None."""
        for index, name in enumerate(NAMES[:3]):
            found = self.nearest(pixels) == index
            if name in words and bool(found.any()):
                rows, columns = found.any(1).nonzero(), found.any(0).nonzero()
                height, width = found.shape
                return (
                    float(columns.min()) / width,
                    float(rows.min()) / height,
                    float(columns.max() + 1) / width,
                    float(rows.max() + 1) / height,
                )
        return None

    def colours(self, pixels):
        counts = torch.bincount(self.nearest(pixels).flatten(), minlength=len(NAMES))
        return [name for name, count in zip(NAMES[:3], counts.tolist()[:3], strict=True) if count]

    def says(self, prompt, pixels):
        """The answer to a question that wants no boxes."""
        names = self.colours(pixels)
        if "how many" in prompt.lower():
            return str(len(names))
        if "colour" in prompt:
            return " and ".join(names)
        if "stop" in prompt:
            return "one two STOP three"
        return "a picture with " + " and ".join(names)


def wanted(prompt, before, after):
    """What stands between two pieces of a prompt; None where they are not there."""
    found = re.search(re.escape(before) + "(.*?)" + re.escape(after), prompt, re.DOTALL)
    return found[1] if found else None


class Speaks(PreTrainedModel, GenerationMixin):
    """A model whose ``generate`` writes, token by token, what ``plan`` decides about the prompt."""

    def __init__(self, config):
        super().__init__(config)
        self.eye = Eye()
        self.post_init()

    def _init_weights(self, module):
        pass

    def plan(self, ids, **inputs):
        """The token ids of the answer to this prompt; without the one that ends it."""
        raise NotImplementedError

    def generate(self, inputs=None, *args, **kwargs):
        ids = kwargs.get("input_ids", inputs)
        assert ids.shape[0] == 1, "one sequence at a time"
        self._start = ids.shape[1]
        self._plan = [*self.plan(ids[0].tolist(), **kwargs), self.config.eos_token_id]
        if inputs is not None:
            return super().generate(inputs, *args, **kwargs)
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def _reorder_cache(self, past_key_values, beam_idx):
        return past_key_values

    def forward(self, input_ids=None, attention_mask=None, return_dict=True, **ignored):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        logits = torch.zeros(1, input_ids.shape[1], self.config.vocab_size)
        at = input_ids.shape[1] - self._start
        logits[0, -1, self._plan[at] if at < len(self._plan) else self.config.eos_token_id] = 9.0
        return CausalLMOutputWithPast(logits=logits)


def count(file, what):
    """A line in the file that the environment names."""
    if file:
        with open(file, "a") as log:
            log.write(what + "\n")


def checksum(pixels):
    return zlib.crc32(pixels.numpy().tobytes())
