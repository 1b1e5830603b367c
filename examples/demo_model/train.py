"""Trains the demo model on two CPU cores: first the eyes (stage dense), then the words (text).

Each text step encodes a picture once and puts many questions behind it in one sequence; every
question sees the picture and itself only, at the positions it would have alone.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import easy_vqa
import numpy as np
import torch
import torch.nn.functional as F
from model import (
    IMAGE_TOKENS,
    PATCH,
    WIDTH,
    export,
    make_model,
    make_processor,
    seed_vision,
    seed_words,
)
from PIL import Image
from shapes import (
    COLOURS,
    DETAILED,
    FORMS,
    GRID,
    SHORT,
    Pair,
    Shape,
    box_of,
    caption,
    detect_pair,
    easy_pairs,
    easy_picture,
    locate_pair,
    matches,
    near_colour,
    scene_pairs,
    scene_picture,
    squashed,
)
from torch import Tensor, nn
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

PREFIX = "<|im_start|>User:<fake_token_around_image><global-img>"
PREFIX += "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
SUFFIX = "<end_of_utterance>\nAssistant:"
IGNORED = -100
SIDE = GRID // PATCH
HELD_OUT = 300  # the last pictures of easy-VQA's train split are for watching, not for training


# -------------------------------------------------------------------------------------- pictures


def easy_train_pictures() -> list[tuple[Image.Image, list[Shape]]]:
    """easy-VQA's train pictures whose questions tell colour and form, with exact boxes."""
    questions = zip(*easy_vqa.get_train_questions(), strict=True)
    forms: dict[int, str] = {}
    colours: dict[int, str] = {}
    for question, answer, image in questions:
        if answer in FORMS:
            forms[image] = answer
        elif answer in COLOURS:
            colours[image] = answer
            noun = question.rstrip("?").split()[-1]
            if noun in FORMS:
                forms[image] = noun
    paths = easy_vqa.get_train_image_paths()
    pictures = []
    for image in sorted(forms.keys() & colours.keys()):
        picture = Image.open(paths[image]).convert("RGB")
        mask = near_colour(np.asarray(picture), colours[image])
        if mask.any():
            pictures.append((picture, [Shape(colours[image], forms[image], box_of(mask))]))
    return pictures


def draw(rng: random.Random, real: list, scenes: float) -> tuple[np.ndarray, list[Shape], bool]:
    """Pixels, shapes, and whether it is an easy-VQA picture (a third of those are real ones)."""
    if rng.random() < scenes:
        picture, shapes = scene_picture(rng)
        return squashed(picture), shapes, False
    picture, shapes = rng.choice(real) if rng.random() < 0.33 else easy_picture(rng)
    return squashed(picture), shapes, True


# ---------------------------------------------------------------------------- dense labels (eyes)

COUNTS = ("same_colour", "same_form", "rank_x", "rank_y")
HEADS = {"covered": 2, "colour": len(COLOURS), "form": len(FORMS), "size": 2, "centre": 2}
HEADS |= dict.fromkeys(COUNTS, 4) | {"place_x": 3, "place_y": 3, "total": 4}
EDGES = ("x1", "y1", "x2", "y2")
IMPORTANCE = dict.fromkeys(HEADS, 1.0) | {"form": 2.0, "total": 2.0}
IMPORTANCE |= dict.fromkeys((*COUNTS, *EDGES), 1.0)


def dense_labels(shapes: list[Shape]) -> dict[str, np.ndarray]:
    """For each of the 64 patches, what it shows of the shape that covers it most."""
    boxes = np.array([s.box for s in shapes])
    lines = np.arange(SIDE) * PATCH
    wide = np.minimum(boxes[:, None, 2], lines + PATCH) - np.maximum(boxes[:, None, 0], lines)
    high = np.minimum(boxes[:, None, 3], lines + PATCH) - np.maximum(boxes[:, None, 1], lines)
    area = high.clip(0)[:, :, None] * wide.clip(0)[:, None, :]
    area = area.reshape(len(shapes), -1)
    owner, most = area.argmax(0), area.max(0)
    covered = (most >= 12) | (most == area.max(1)[owner])
    covered &= most > 0
    by_y = sorted(range(len(shapes)), key=lambda i: shapes[i].centre[::-1])
    facts = {
        "colour": [list(COLOURS).index(s.colour) for s in shapes],
        "form": [FORMS.index(s.form) for s in shapes],
        "size": [int(s.size == "large") for s in shapes],
        "same_colour": [sum(o.colour == s.colour for o in shapes) - 1 for s in shapes],
        "same_form": [sum(o.form == s.form for o in shapes) - 1 for s in shapes],
        "rank_x": list(range(len(shapes))),
        "rank_y": [by_y.index(i) for i in range(len(shapes))],
        "place_x": [min(2, int(3 * s.centre[0] / GRID)) for s in shapes],
        "place_y": [min(2, int(3 * s.centre[1] / GRID)) for s in shapes],
    }
    labels = {k: np.where(covered, np.array(v)[owner], IGNORED) for k, v in facts.items()}
    for i, edge in enumerate(EDGES):
        labels[edge] = np.where(covered, boxes[owner, i], IGNORED)
    labels["covered"] = covered.astype(np.int64)
    labels["total"] = np.full(SIDE * SIDE, len(shapes) - 1)
    home = [int(s.centre[1]) // PATCH * SIDE + int(s.centre[0]) // PATCH for s in shapes]
    labels["centre"] = np.isin(np.arange(SIDE * SIDE), home).astype(np.int64)
    return labels


class DenseHeads(nn.Module):
    """Reads the dense labels off each image token; used in training only, never exported."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.sizes = HEADS | dict.fromkeys(EDGES, GRID + 1)
        self.out = nn.Linear(WIDTH, sum(self.sizes.values()))

    @torch.no_grad()
    def directions(self, processor: Idefics3Processor) -> dict[int, Tensor]:
        """For each colour's and form's token, the direction of the image tokens that show it."""
        ids = processor.tokenizer.convert_tokens_to_ids
        rows = dict(zip(self.sizes, self.out.weight.split(list(self.sizes.values())), strict=True))
        found = {}
        for name, words in (("colour", list(COLOURS)), ("form", list(FORMS))):
            for word, row in zip(words, rows[name] * self.norm.weight, strict=True):
                found |= {ids(word): row, ids("Ġ" + word): row}
        return found

    def losses(self, tokens: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Mean of all heads' losses, and each head's share of right tokens."""
        parts = self.out(self.norm(tokens)).split(list(self.sizes.values()), -1)
        total, right = tokens.new_zeros(()), {}
        for (name, _), logits in zip(self.sizes.items(), parts, strict=True):
            keep = labels[name] != IGNORED
            logits, target = logits[keep], labels[name][keep]
            if name in EDGES:
                total = total + IMPORTANCE[name] * soft_loss(logits, target).mean()
                hit = (logits.argmax(-1) - target).abs() <= 1
            else:
                total = total + IMPORTANCE[name] * F.cross_entropy(logits, target)
                hit = logits.argmax(-1) == target
            right[name] = hit.float().mean().item()
        return total / len(self.sizes), right


def soft_loss(logits: Tensor, target: Tensor, sigma: float = 1.0) -> Tensor:
    """Cross-entropy against a Gaussian of `sigma` bins around the target edge, one per row."""
    bins = torch.arange(logits.shape[-1])
    aim = torch.exp(-0.5 * ((bins - target[:, None]) / sigma) ** 2)
    return -(aim / aim.sum(-1, keepdim=True) * logits.log_softmax(-1)).sum(-1)


# -------------------------------------------------------------------------------- packed sequences


@dataclass(slots=True)
class Batch:
    pixels: Tensor  # pictures x 64 x 64 x 3, bytes
    dense: dict[str, Tensor]  # each pictures x 64
    ids: Tensor  # pictures x length; the prefix, then the segments
    segment: Tensor  # 0 in the prefix, then 1, 2, ...; -1 in the padding
    position: Tensor
    target: Tensor  # the id to predict here, or -100
    weight: Tensor
    kind: Tensor  # index into KINDS where there is a target
    named: Tensor  # how many shapes the name that ends here fits, or -100
    named_box: Tensor  # pictures x length x 4; the box of the only shape that fits, or -100


class NameHeads(nn.Module):
    """Reads off a name's last token, half-way up the text tower, what the name fits.

    In training only: it teaches the tower to look a name up in the picture before the answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.count = nn.Linear(WIDTH, 5)
        self.edges = nn.Linear(WIDTH, 4 * (GRID + 1))

    def losses(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, float, float]:
        """The loss, and the shares of right counts and of edges at most one bin off."""
        keep = batch.named != IGNORED
        x, count, box = self.norm(hidden[keep]), batch.named[keep], batch.named_box[keep]
        counts = self.count(x)
        one = box[:, 0] != IGNORED
        edges, box = self.edges(x[one]).view(-1, GRID + 1), box[one].view(-1)
        loss = F.cross_entropy(counts, count) + soft_loss(edges, box).mean()
        right = (counts.argmax(-1) == count).float().mean().item()
        return loss, right, ((edges.argmax(-1) - box).abs() <= 1).float().mean().item()


KINDS = ("short", "detailed", "vqa", "locate", "detect")


class Packer:
    """Turns pictures and question-answer pairs into batches of packed sequences."""

    def __init__(self, processor: Idefics3Processor) -> None:
        self.words = processor.tokenizer
        self.prefix = self.ids(PREFIX)
        self.suffix = self.ids(SUFFIX)
        self.end = self.words.eos_token_id
        self.first_loc = self.words.convert_tokens_to_ids("<loc_0>")

    @lru_cache(maxsize=200_000)  # noqa: B019
    def ids(self, text: str) -> list[int]:
        return self.words(text)["input_ids"]

    def weight(self, kind: str, token: int) -> float:
        """Few tokens answer a question and many make a box, so that each counts otherwise."""
        if token == self.end:
            return 0.5
        return 3.0 if kind == "vqa" else 0.5 if token >= self.first_loc else 1.0

    def pairs(self, shapes: list[Shape], easy: bool, rng: random.Random) -> list[tuple[str, Pair]]:
        """What is asked about one picture, in no order; the packer takes what fits."""
        pairs: list[tuple[str, Pair]] = []
        vqa = easy_pairs(shapes[0], rng, 6) if easy else scene_pairs(shapes, rng, 6)
        if easy and rng.random() < 0.5:
            vqa += scene_pairs(shapes, rng, 1)
        pairs += [("vqa", pair) for pair in vqa]
        pairs += [("locate", locate_pair(shapes, rng)) for _ in range(4)]
        pairs += [("detect", detect_pair(shapes, rng)) for _ in range(1 if easy else 2)]
        if rng.random() < 0.4:
            pairs.append(("detailed", (DETAILED, caption(shapes, True))))
        rng.shuffle(pairs)
        return [("short", (SHORT, caption(shapes))), *pairs]

    def batch(
        self,
        pictures: list[tuple[np.ndarray, list[Shape], bool]],
        length: int,
        rng: random.Random,
        asked: int = 10**9,
    ) -> Batch:
        """Sequences of `length` tokens for the first `asked` pictures; the rest is only seen."""
        rows = [
            self._row(shapes, self.pairs(shapes, easy, rng), length, rng)
            for _, shapes, easy in pictures[:asked]
        ]
        columns = [torch.tensor(np.array(column)) for column in zip(*rows, strict=True)]
        dense = [dense_labels(shapes) for _, shapes, _ in pictures]
        return Batch(
            torch.tensor(np.stack([pixels for pixels, _, _ in pictures])),
            {name: torch.tensor(np.stack([d[name] for d in dense])) for name in dense[0]},
            *columns,
        )

    def _names(self, asked: list[int], shapes: list[Shape]) -> Iterator[tuple[int, list[Shape]]]:
        """Where in a question the name of a colour, a form or both ends, and what it fits."""
        words = [self.word(token) for token in asked]
        for place, word in enumerate(words):
            before = words[place - 1] if place and words[place - 1] in COLOURS else ""
            if word in (*FORMS, "square", "shape", "object"):
                yield place, matches(shapes, f"{before} {word}")
            elif word in COLOURS and words[place + 1] not in (*FORMS, "square", "shape", "object"):
                yield place, matches(shapes, word)

    @lru_cache(maxsize=10_000)  # noqa: B019
    def word(self, token: int) -> str:
        return self.words.convert_ids_to_tokens(token).strip("Ġ").removesuffix("s")

    def _row(
        self,
        shapes: list[Shape],
        pairs: list[tuple[str, Pair]],
        length: int,
        rng: random.Random,
    ) -> tuple[list, ...]:
        """One sequence, column by column as in Batch from `ids` on."""
        ids = list(self.prefix)
        segment, position = [0] * len(ids), list(range(len(ids)))
        target, weight, kinds = [IGNORED] * len(ids), [0.0] * len(ids), [0] * len(ids)
        named, boxes = [IGNORED] * length, [[IGNORED] * 4 for _ in range(length)]
        for number, (kind, (question, answer)) in enumerate(pairs, 1):
            if rng.random() < 0.15:
                question = question[0].upper() + question[1:]
            asked = self.ids(question) + self.suffix
            said = [*self.ids(answer), self.end]
            if len(ids) + len(asked) + len(said) - 1 > length:
                continue
            for place, fits in self._names(asked, shapes):
                named[len(ids) + place] = len(fits)
                if len(fits) == 1:
                    boxes[len(ids) + place] = list(fits[0].box)
            ids += asked + said[:-1]
            size = len(asked) + len(said) - 1
            segment += [number] * size
            position += range(len(self.prefix), len(self.prefix) + size)
            target += [IGNORED] * (len(asked) - 1) + said
            weight += [0.0] * (len(asked) - 1)
            weight += [self.weight(kind, token) for token in said]
            kinds += [KINDS.index(kind)] * size
        short = length - len(ids)
        return (
            ids + [self.words.pad_token_id] * short,
            segment + [-1] * short,
            position + [0] * short,
            target + [IGNORED] * short,
            weight + [0.0] * short,
            kinds + [0] * short,
            named,
            boxes,
        )


class Batches(torch.utils.data.IterableDataset):
    """Endless batches; batch k is drawn from the seed and k alone."""

    def __init__(self, packer: Packer, args: argparse.Namespace, start: int) -> None:
        self.packer, self.seed, self.start = packer, f"{args.seed} {args.stage}", start
        self.size, self.seen = args.batch, args.seen
        self.length, self.scenes = args.length, args.scenes
        self.real = easy_train_pictures()[:-HELD_OUT]

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.start, 10**9):
            rng = random.Random(f"{self.seed} {number}")
            count = self.size + self.seen
            pictures = [draw(rng, self.real, self.scenes) for _ in range(count)]
            yield self.packer.batch(pictures, self.length, rng, self.size)


# ---------------------------------------------------------------------------------- forward passes


def image_tokens(model: Idefics3ForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Pictures x 64 x width; the same numbers as model.get_image_features, without its loops."""
    eyes = model.model.vision_model
    x = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    x = eyes.embeddings.patch_embedding(x).flatten(2).transpose(1, 2)
    x = eyes.encoder(inputs_embeds=x + eyes.embeddings.position_embedding.weight)
    return model.model.connector(eyes.post_layernorm(x.last_hidden_state))


def answer_logits(model: Idefics3ForConditionalGeneration, tokens: Tensor, batch: Batch) -> Tensor:
    """Logits at the places that have a target, in reading order."""
    return read(model, tokens, batch)[0]


def read(
    model: Idefics3ForConditionalGeneration, tokens: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Logits at the places that have a target, and all hidden states half-way up."""
    text = model.model.text_model
    first = PREFIX.split("<image>")[0].count("<") + 2  # <|im_start|> User : <fake> <global-img>
    x = text.embed_tokens(batch.ids)
    x = torch.cat([x[:, :first], tokens, x[:, first + IMAGE_TOKENS :]], 1)
    here, there = batch.segment[:, :, None], batch.segment[:, None, :]
    seen = ((there == 0) | (here == there)).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    middle: list[Tensor] = []
    hook = text.layers[len(text.layers) // 2 - 1].register_forward_hook(
        lambda _module, _inputs, output: middle.append(output)
    )
    hidden = text(
        inputs_embeds=x,
        attention_mask=mask[:, None],
        position_ids=batch.position,
        use_cache=False,
    ).last_hidden_state
    hook.remove()
    return model.lm_head(hidden[batch.target != IGNORED]), middle[0]


def text_loss(logits: Tensor, batch: Batch, locs: tuple[int, int]) -> Tensor:
    """Weighted mean over the answers' tokens; edges of boxes with soft targets."""
    keep = batch.target != IGNORED
    target, weight = batch.target[keep], batch.weight[keep]
    loss = F.cross_entropy(logits, target, reduction="none")
    edge = (target >= locs[0]) & (target < locs[1])
    logits, bins = logits[edge], target[edge] - locs[0]
    inside = logits.log_softmax(-1)[:, locs[0] : locs[1]]
    aim = torch.exp(-0.5 * (torch.arange(GRID + 1) - bins[:, None]) ** 2)
    soft = -(aim / aim.sum(-1, keepdim=True) * inside).sum(-1)
    loss = loss.masked_scatter(edge, soft)
    return (loss * weight).sum() / weight.sum()


# ----------------------------------------------------------------------------------------- watching


@torch.no_grad()
def watch(
    model: Idefics3ForConditionalGeneration, batches: list[Batch], locs: tuple[int, int]
) -> dict[str, float]:
    """Share of answers that greedy decoding gets exactly right, by kind; boxes by IoU >= 0.5.

    An answer is right when each token is the likeliest one behind the right tokens before it, which
    is what greedy decoding writes. Boxes count when every edge's likeliest bins overlap enough.
    """
    model.eval()
    right: dict[str, list[bool]] = {}
    for batch in batches:
        keep = batch.target != IGNORED
        guess = answer_logits(model, image_tokens(model, batch.pixels), batch).argmax(-1)
        target = batch.target[keep]
        row = torch.arange(len(keep))[:, None].expand_as(keep)[keep]
        owner = row * 1000 + batch.segment[keep]
        kind = batch.kind[keep]
        for key in owner.unique():
            mine = owner == key
            aim, said = target[mine], guess[mine]
            name = KINDS[int(kind[mine][0])]
            edges = (aim >= locs[0]) & (aim < locs[1])
            ok = bool((aim == said)[~edges].all())
            if edges.any():
                a = aim[edges].view(-1, 4) - locs[0]
                b = said[edges].view(-1, 4) - locs[0]
                ok = ok and bool((iou(a, b) >= 0.5).all())
            right.setdefault(name, []).append(ok)
    model.train()
    return {name: round(sum(r) / len(r), 4) for name, r in sorted(right.items())}


def iou(a: Tensor, b: Tensor) -> Tensor:
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area = (a[:, 2:] - a[:, :2]).clamp(min=0).prod(-1) + (b[:, 2:] - b[:, :2]).clamp(min=0).prod(-1)
    return inter / (area - inter).clamp(min=1)


# ----------------------------------------------------------------------------------------- training


def rate(step: int, steps: int, warmup: int, decay: int) -> float:
    """Share of the peak learning rate: up over `warmup` steps, flat, down over the last `decay`."""
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    processor = make_processor()
    packer = Packer(processor)
    locs = tuple(processor.tokenizer.convert_tokens_to_ids(["<loc_0>", f"<loc_{GRID}>"]))
    locs = (locs[0], locs[1] + 1)
    model, heads, names = make_model(processor), DenseHeads(), NameHeads()
    seed_vision(model)
    dense_only = args.stage == "dense"
    params = [p for part in (model, heads, names) for p in part.parameters()]
    decayed = [p for p in params if p.ndim >= 2]
    rest = [p for p in params if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    start = 0
    args.work.mkdir(parents=True, exist_ok=True)
    state_file = args.work / f"{args.stage}.pt"
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        names.load_state_dict(state.get("names", names.state_dict()))
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    elif args.init:
        state = torch.load(args.work / f"{args.init}.pt")
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        names.load_state_dict(state.get("names", names.state_dict()))
        if args.init == "dense":
            seed_words(model, heads.directions(processor))
        if args.keep_optimizer:
            optimizer.load_state_dict(state["optimizer"])
    data = Batches(packer, args, start)
    loader = iter(
        torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4)
    )
    held = easy_train_pictures()[-HELD_OUT:]
    rng = random.Random(f"{args.seed} watch")
    easy = [(squashed(picture), shapes, True) for picture, shapes in held[:64]]
    scenes = [(squashed(p), s, False) for p, s in (scene_picture(rng) for _ in range(64))]
    checks = {
        "easy": [packer.batch(easy[i : i + 32], 512, rng) for i in (0, 32)],
        "scenes": [packer.batch(scenes[i : i + 32], 512, rng) for i in (0, 32)],
    }
    began, since = time.perf_counter(), time.perf_counter()
    for step in range(start, args.steps):
        share = rate(step, args.steps, args.warmup, args.decay)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * share
        batch = next(loader)
        tokens = image_tokens(model, batch.pixels)
        dense, right = heads.losses(tokens, batch.dense)
        loss = dense
        words, found = torch.zeros(()), []
        if not dense_only:
            logits, middle = read(model, tokens[: args.batch], batch)
            words = text_loss(logits, batch, locs)
            name_loss, *found = names.losses(middle, batch)
            loss = words + args.dense_weight * dense + args.name_weight * name_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if (step + 1) % args.log == 0:
            took, since = time.perf_counter() - since, time.perf_counter()
            line = {
                "step": step + 1,
                "dense": round(dense.item(), 4),
                "text": round(words.item(), 4),
                "names": [round(share, 3) for share in found],
                "pictures/s": round(args.batch * args.log / took, 1),
                "seconds": round(time.perf_counter() - began),
            }
            if dense_only:
                line["right"] = {k: round(v, 2) for k, v in right.items()}
            print(json.dumps(line), flush=True)
        if (step + 1) % args.save == 0 or step + 1 == args.steps:
            if not dense_only:
                print({k: watch(model, v, locs) for k, v in checks.items()}, flush=True)
            state = {"model": model.state_dict(), "heads": heads.state_dict(), "step": step + 1}
            state["names"] = names.state_dict()
            torch.save(state | {"optimizer": optimizer.state_dict()}, state_file)
    print(f"{args.stage}: {time.perf_counter() - began:.0f} s", flush=True)
    if args.export:
        export(model, args.export)


COMMON: dict[str, object] = {
    "init": None,
    "keep_optimizer": False,
    "work": Path("build/demo_model"),
    "batch": 16,
    "seen": 0,
    "length": 256,
    "scenes": 0.5,
    "lr": 8e-4,
    "warmup": 50,
    "dense_weight": 1.0,
    "name_weight": 0.5,
    "log": 20,
    "save": 200,
    "seed": 1,
    "threads": 2,
    "export": None,
}
STAGES: dict[str, dict[str, object]] = {
    "dense": {"steps": 1000, "batch": 24, "lr": 1.2e-3, "warmup": 100, "decay": 1},
    "text_a": {"init": "dense", "steps": 1250, "lr": 1e-3, "decay": 250, "name_weight": 0.0},
    "text_b": {
        "init": "text_a",
        "keep_optimizer": True,
        "steps": 400,
        "decay": 1,
        "scenes": 0.65,
        "seen": 24,
        "name_weight": 0.0,
    },
    "text_c": {"init": "text_b", "steps": 940, "decay": 700, "scenes": 0.65, "seen": 24},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Without an option, a stage has what STAGES gives it."
    )
    parser.add_argument("--stage", choices=STAGES, help="one stage; without it, all in turn")
    parser.add_argument("--init", help="stage to start from")
    parser.add_argument("--keep-optimizer", action="store_true", default=None)
    parser.add_argument("--work", type=Path, help="where each stage's state is kept")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="pictures a step")
    parser.add_argument("--seen", type=int, help="more pictures a step without text")
    parser.add_argument("--length", type=int, help="tokens of a packed sequence")
    parser.add_argument("--scenes", type=float, help="share of scene pictures")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--warmup", type=int, help="steps")
    parser.add_argument("--decay", type=int, help="steps")
    parser.add_argument("--dense-weight", type=float)
    parser.add_argument("--name-weight", type=float)
    parser.add_argument("--log", type=int, help="a line every so many steps")
    parser.add_argument("--save", type=int, help="a state every so many steps")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--export", type=Path, help="folder for the finished checkpoint")
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    for stage in [given["stage"]] if "stage" in given else STAGES:
        train(argparse.Namespace(**COMMON | {"stage": stage} | STAGES[stage] | given))


if __name__ == "__main__":
    main()
