"""Scores the demo checkpoint as anyone would use it, and prints the scores as JSON.

transformers' AutoProcessor and AutoModelForImageTextToText, left-padded batches, greedy decoding.
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import easy_vqa
import numpy as np
import torch
from PIL import Image
from shapes import (
    COLOURS,
    DETAILED,
    FORMS,
    SHORT,
    Box,
    Shape,
    box_of,
    caption,
    locate_pair,
    matches,
    near_colour,
    scene_pairs,
    scene_picture,
)
from transformers import AutoModelForImageTextToText, AutoProcessor

CHECKPOINT = Path(__file__).parents[2] / "vlmbatch" / "demo"
SEED = "held-out scenes"
FOUND = re.compile(r"([a-z ]*)<loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)>")


class Asker:
    """Answers (picture, prompt) pairs in left-padded batches of similar length, greedily."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.batch = batch

    def __call__(self, asked: list[tuple[Image.Image, str]], most: int = 64) -> list[str]:
        """`most` is the largest number of new tokens."""
        order = sorted(range(len(asked)), key=lambda i: len(asked[i][1]))
        answers: dict[int, str] = {}
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            answers |= zip(part, self._answer([asked[i] for i in part], most), strict=True)
        return [answers[i] for i in range(len(asked))]

    @torch.inference_mode()
    def _answer(self, asked: list[tuple[Image.Image, str]], most: int) -> list[str]:
        prompts = []
        for _, prompt in asked:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            turns = [{"role": "user", "content": content}]
            prompts.append(self.processor.apply_chat_template(turns, add_generation_prompt=True))
        images = [[image] for image, _ in asked]
        inputs = self.processor(
            text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt"
        )
        output = self.model.generate(**inputs, max_new_tokens=most, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]


def boxes_in(answer: str) -> list[tuple[str, Box]]:
    """Every label (empty when located) and box of an answer, in 64ths of the picture's sides."""
    return [
        (found[0].strip(), tuple(int(edge) for edge in found[1:]))
        for found in FOUND.findall(answer)
    ]


def iou(a: Box, b: Box) -> float:
    wide = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - wide * high
    return wide * high / area if area > 0 else 0.0


def share(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


# ---------------------------------------------------------------------------------------- easy-VQA


def easy_scores(ask: Asker) -> dict[str, float]:
    """On easy-VQA's test split, no picture of which is trained on."""
    paths = easy_vqa.get_test_image_paths()
    pictures = {image: Image.open(path).convert("RGB") for image, path in paths.items()}
    questions = list(zip(*easy_vqa.get_test_questions(), strict=True))
    answers = ask([(pictures[image], question) for question, _, image in questions], 8)
    forms = {image: answer for _, answer, image in questions if answer in FORMS}
    colours = {image: answer for _, answer, image in questions if answer in COLOURS}
    both = sorted(forms.keys() & colours.keys())
    captions = ask([(pictures[image], SHORT) for image in both], 16)
    overlaps = []
    asked = [(pictures[i], f"Locate: the {colour} shape") for i, colour in colours.items()]
    for (picture, _), colour, answer in zip(asked, colours.values(), ask(asked), strict=True):
        box = box_of(near_colour(np.asarray(picture), colour))
        found = boxes_in(answer)
        overlaps.append(iou(found[0][1], box) if len(found) == 1 else 0.0)
    return {
        "questions": len(questions),
        "questions_right": share([a == q[1] for a, q in zip(answers, questions, strict=True)]),
        "captions": len(both),
        "captions_right": share(
            [c == f"a {colours[i]} {forms[i]}" for c, i in zip(captions, both, strict=True)]
        ),
        "boxes": len(overlaps),
        "boxes_iou_50": share([overlap >= 0.5 for overlap in overlaps]),
        "boxes_mean_iou": round(sum(overlaps) / len(overlaps), 4),
    }


# ------------------------------------------------------------------------------------------ scenes


def scene_scores(ask: Asker, count: int) -> dict[str, float]:
    """On drawn scenes of one to four shapes from a seed that training does not use."""
    rng = random.Random(SEED)
    scenes = [scene_picture(rng) for _ in range(count)]
    short = ask([(picture, SHORT) for picture, _ in scenes])
    detailed = ask([(picture, DETAILED) for picture, _ in scenes], 96)
    wanted = [shapes for _, shapes in scenes]
    questions = [(p, *pair) for p, shapes in scenes for pair in scene_pairs(shapes, rng, 6)]
    answers = ask([(picture, question) for picture, question, _ in questions], 8)
    scores = {
        "scenes": count,
        "captions_right": share(
            [_named(c) == Counter(s.name for s in w) for c, w in zip(short, wanted, strict=True)]
        ),
        "captions_exact": share([c == caption(w) for c, w in zip(short, wanted, strict=True)]),
        "detailed_exact": share(
            [c == caption(w, True) for c, w in zip(detailed, wanted, strict=True)]
        ),
        "questions": len(questions),
        "questions_right": share([a == q[2] for a, q in zip(answers, questions, strict=True)]),
    }
    return scores | _locate_scores(ask, scenes, rng) | _detect_scores(ask, scenes, rng)


def _named(text: str) -> Counter[str]:
    return Counter(re.findall(rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(FORMS)})", text))


def _locate_scores(
    ask: Asker, scenes: list[tuple[Image.Image, list[Shape]]], rng: random.Random
) -> dict[str, float]:
    """Phrases that name one shape, several, or none; every box must be found, and no other."""
    asked = [(picture, *locate_pair(shapes, rng)) for picture, shapes in scenes for _ in range(3)]
    answers = ask([(picture, question) for picture, question, _ in asked])
    hits: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    for (_, _, right), answer in zip(asked, answers, strict=True):
        wanted, found = boxes_in(right), boxes_in(answer)
        ok = len(wanted) == len(found) and _matched(wanted, found) == len(wanted)
        hits[min(2, len(wanted))].append(ok)
    return {
        "phrases_one": len(hits[1]),
        "phrases_one_iou_50": share(hits[1]),
        "phrases_several": len(hits[2]),
        "phrases_several_iou_50": share(hits[2]),
        "phrases_none": len(hits[0]),
        "phrases_none_right": share(hits[0]),
    }


def _detect_scores(
    ask: Asker, scenes: list[tuple[Image.Image, list[Shape]]], rng: random.Random
) -> dict[str, float]:
    """Every name in the scene and one more are asked for in one prompt."""
    asked, wanted = [], []
    for picture, shapes in scenes:
        labels = sorted({s.name for s in shapes})
        labels.append(f"{rng.choice(list(COLOURS))} {rng.choice(FORMS)}")
        labels = list(dict.fromkeys(labels))
        rng.shuffle(labels)
        asked.append((picture, f"Detect: {', '.join(labels)}"))
        wanted.append([(label, s.box) for label in labels for s in matches(shapes, label)])
    found = [boxes_in(answer) for answer in ask(asked, 96)]
    hits = sum(_matched(w, f) for w, f in zip(wanted, found, strict=True))
    precision = hits / max(1, sum(map(len, found)))
    recall = hits / sum(map(len, wanted))
    return {
        "detect_boxes": sum(map(len, wanted)),
        "detect_precision": round(precision, 4),
        "detect_recall": round(recall, 4),
        "detect_f1_iou_50": round(2 * precision * recall / max(1e-9, precision + recall), 4),
    }


def _matched(wanted: list[tuple[str, Box]], found: list[tuple[str, Box]]) -> int:
    """How many wanted boxes have a found one of their own, same label, with IoU of at least 0.5."""
    left, hits = list(found), 0
    for label, box in wanted:
        best = max((f for f in left if f[0] == label), key=lambda f: iou(box, f[1]), default=None)
        if best and iou(box, best[1]) >= 0.5:
            left.remove(best)
            hits += 1
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    ask = Asker(args.model, args.batch)
    scores = {"easy_vqa_test": easy_scores(ask), "scenes": scene_scores(ask, args.scenes)}
    scores["seconds"] = round(time.perf_counter() - began)
    scores["parameters"] = sum(p.numel() for p in ask.model.parameters())
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
