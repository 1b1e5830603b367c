"""A stand-in with Qwen-VL's entry points: a tokenizer that puts the image's path into the ids as
bytes, and a model that opens that path."""

from types import MappingProxyType

from PIL import Image
from transformers import PretrainedConfig, PreTrainedTokenizer

from .pixels import Speaks, tensor_of, wanted

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>")
BOXES = ("<ref>", "</ref>", "<box>", "</box>")
ALL = {text: 256 + at for at, text in enumerate((*SPECIALS, *BOXES))}
SPAN = 256


class QWenConfig(PretrainedConfig):
    model_type = "qwen"

    def __init__(self, visual=None, vocab_size=300, **kwargs):
        self.visual = visual or {"image_size": 448, "image_start_id": ALL["<img>"]}
        self.vocab_size = vocab_size
        self.num_hidden_layers = 1
        super().__init__(**kwargs)


class QWenTokenizer(PreTrainedTokenizer):
    """Bytes, and ``ALL``; without eos or pad, as the real one."""

    vocab_files_names = MappingProxyType({})
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, **kwargs):
        self.eod_id = ALL["<|endoftext|>"]
        self.im_start_id, self.im_end_id = ALL["<|im_start|>"], ALL["<|im_end|>"]
        self.names = {number: text for text, number in ALL.items()}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return 256 + len(ALL)

    def get_vocab(self):
        """Bytes, not text: its vocabulary does not have special tokens by name."""
        return {bytes([i]): i for i in range(256)}

    def tokenize(self, text, **kwargs):
        tokens = []
        while text:
            name = next((name for name in ALL if text.startswith(name)), None)
            if name == "<img>":
                path, _, text = text[5:].partition("</img>")
                path = path.encode()
                assert len(path) < SPAN, "the path is too long"
                pad = SPAN - len(path)
                tokens += ["<img>", *(bytes([b]) for b in path), *["<imgpad>"] * pad, "</img>"]
            elif name is not None:
                tokens.append(name)
                text = text[len(name) :]
            else:
                tokens += [bytes([b]) for b in text[0].encode()]
                text = text[1:]
        return tokens

    def convert_tokens_to_ids(self, tokens):
        if isinstance(tokens, (str, bytes)):
            return ALL[tokens] if tokens in ALL else tokens[0] if tokens else None
        return [ALL[token] if token in ALL else token[0] for token in tokens]

    def _convert_id_to_token(self, index):
        return self.names.get(index, bytes([index % 256]))

    def _decode(self, token_ids, skip_special_tokens=False, **kwargs):
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        out = b""
        for i in ids:
            out += (
                bytes([i])
                if i < 256
                else b""
                if skip_special_tokens
                else self.names.get(i, "?").encode()
            )
        return out.decode(errors="replace")

    def save_vocabulary(self, save_directory, **kwargs):
        return ()


class QWenLMHeadModel(Speaks):
    config_class = QWenConfig

    def plan(self, ids, **kwargs):
        start = self.config.visual["image_start_id"]
        at = ids.index(start)
        path = ids[at + 1 : ids.index(start + 2)]
        with Image.open(bytes(path).decode()) as image:
            pixels = tensor_of(image)
        prompt = bytes(i for i in ids[at + SPAN :] if i < 256).decode()
        chat = ALL["<|im_start|>"] in ids
        what = wanted(prompt + "\n", "Output the bounding box of ", "\n") if chat else None
        if ids[-1] == ALL["<box>"]:  # the base model goes on inside the box
            what = bytes(ids[ids.index(ALL["<ref>"]) + 1 : ids.index(ALL["</ref>"])]).decode()
            first, *rest = self._boxes(what, pixels)
            return first[first.index(ALL["<box>"]) + 1 :] + [i for box in rest for i in box]
        if what is not None:
            return [i for box in self._boxes(what, pixels) for i in box] or list(b"none")
        ends = [ALL["<|im_end|>"]] if chat else []
        return [*self.eye.says(prompt, pixels).encode(), *ends]

    def _boxes(self, what, pixels):
        found = []
        for label in what.split(", "):
            box = self.eye.box(pixels, label)
            if box is not None:
                x1, y1, x2, y2 = (min(round(edge * 999), 999) for edge in box)
                numbers = f"({x1},{y1}),({x2},{y2})".encode()
                ref = [ALL["<ref>"], *label.encode(), ALL["</ref>"]]
                found.append([*ref, ALL["<box>"], *numbers, ALL["</box>"]])
        return found
