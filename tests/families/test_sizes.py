"""What an image costs: figures measured with the processors, and the processors' own functions."""

import random

import pytest

from vlmbatch.families import family_for
from vlmbatch.families.deepseek_vl2 import DeepSeekVL2
from vlmbatch.families.gemma import Gemma4
from vlmbatch.families.glm import Glm
from vlmbatch.families.internvl import InternVL
from vlmbatch.families.kimi import Kimi
from vlmbatch.families.minicpm import MiniCPM46, slices
from vlmbatch.families.phi import Phi4, Phi35
from vlmbatch.families.sizes import at_most, shrink_into, shrink_to_pixels, tile_grid
from vlmbatch.grounding import Size

VGA, HD = Size(640, 480), Size(1920, 1080)


def sizes(seed: int, count: int = 1_000) -> list[Size]:
    rng = random.Random(seed)
    longest = [rng.choice((60, 1_000, 6_000)) for _ in range(count)]
    return [Size(rng.randint(1, n), rng.randint(1, n)) for n in longest]


@pytest.mark.parametrize(
    ("config", "vga", "hd"),
    [
        ({"model_type": "internvl"}, 13 * 256 + 2, 9 * 256 + 2),
        ({"model_type": "internvl", "preprocessor": {"max_patches": 1}}, 256 + 2, 256 + 2),
        ({"model_type": "internvl_chat", "max_dynamic_patch": 6}, 7 * 256 + 2, 3 * 256 + 2),
        ({"model_type": "gemma3"}, 256, 256),
        ({"model_type": "gemma4"}, 266, 264),
        ({"model_type": "moondream1"}, 730, 730),
        ({"architectures": ["CogVLMForCausalLM"]}, 1227, 1227),
        ({"architectures": ["CogVLMForCausalLM"], "vision_config": {"image_size": 224}}, 258, 258),
        ({"model_type": "deepseek_vl_v2"}, 211 + 28 * 29, 211 + 28 * 57),
        ({"model_type": "molmo"}, None, None),
    ],
)
def test_the_tokens_of_an_image(config, vga, hd):
    family = family_for(config)
    assert (family.image_tokens(VGA), family.image_tokens(HD)) == (vga, hd)
    assert family.image_tokens(family.target(HD)) == family.image_tokens(HD)


def test_internvls_tiles_are_those_of_transformers():
    theirs = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    family = InternVL()
    for size in sizes(1):
        for most in (1, 6, 12):
            grid = theirs.get_optimal_tiled_canvas((size.height, size.width), (448, 448), 1, most)
            assert tile_grid(size, 448, most) == grid, size
        assert tile_grid(family.target(size), 448, 12) == tile_grid(size, 448, 12), size


def test_glms_resizing_is_that_of_transformers():
    theirs = pytest.importorskip("transformers.models.glm4v.image_processing_pil_glm4v")
    family = Glm()
    for size in sizes(2):
        given, expected = family.target(size), None
        try:
            height, width = theirs.smart_resize(
                2, given.height, given.width, min_pixels=112 * 112, max_pixels=28 * 28 * 15_000
            )
            expected = height * width // 28**2
        except ValueError:
            pass  # too long a shape
        assert family.image_tokens(size) == expected, size


def test_gemma_4s_resizing_is_that_of_transformers():
    theirs = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    for tokens in (70, 280, 1120):
        family = Gemma4({"preprocessor": {"max_soft_tokens": tokens}})
        for size in sizes(3, 300):
            given = family.target(size)
            height, width = theirs.get_aspect_ratio_preserving_size(
                given.height, given.width, 16, 9 * tokens, 3
            )
            assert family.image_tokens(size) == height * width // 48**2, size


@pytest.mark.parametrize("mode", ["16x", "4x"])
def test_minicpm_4_6s_slices_are_those_of_transformers(mode):
    module = pytest.importorskip("transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6")
    theirs = module.MiniCPMV4_6ImageProcessorPil()
    family = MiniCPM46({"preprocessor": {"downsample_mode": mode}})
    for size in sizes(4):
        given = family.target(size)
        hw = (given.height, given.width)
        grid = theirs.get_sliced_grid(hw, 9, 448)
        assert slices(given, 448, 9) == tuple(grid or (0, 0)), size
        height, width = theirs.find_best_resize(hw, 448, 14, allow_upscale=grid is None)
        tokens = (height // 14) * (width // 14) // (16 if mode == "16x" else 4) + 2
        if grid:
            height, width = theirs.get_refine_size(hw, grid, 448, 14, allow_upscale=True)
            one = (height // grid[0] // 14) * (width // grid[1] // 14)
            tokens += grid[0] * grid[1] * (one // (16 if mode == "16x" else 4) + 2)
        assert family.image_tokens(size) == tokens, size


def test_phi_4_counts_what_is_not_padding():
    """With the mask drawn as the processor draws it; the processor itself needs torchvision."""
    family = Phi4()
    for size in [VGA, HD, *sizes(5, 100)]:
        columns, rows = -(-size.width // 448), -(-size.height // 448)
        if columns * rows > 36:
            columns, rows = tile_grid(size, 448, 36)
        scale = min(columns * 448 / size.width, rows * 448 / size.height)
        by_width = columns * 448 / size.width < rows * 448 / size.height
        pad_x = 0 if by_width else columns * 448 - int(size.width * scale)
        pad_y = rows * 448 - int(size.height * scale) if by_width else 0
        mask = [[1] * (32 * columns) for _ in range(32 * rows)]
        if pad_x >= 14:
            for line in mask:
                line[-(pad_x // 14) :] = [0] * (pad_x // 14)
        if pad_y >= 14:
            for line in mask[-(pad_y // 14) :]:
                line[:] = [0] * len(line)
        half = [line[::2] for line in mask[::2]]
        expected = 256 + 1 + sum(map(sum, half)) + sum(line[0] for line in half) + 16
        assert family.image_tokens(size) in (expected, None), size


def test_phi_3_5_tiles():
    assert Phi35(16).image_tokens(Size(1000, 1000)) == 17 * 144 + 1 + 5 * 12  # 4 x 4 tiles
    assert Phi35(4).image_tokens(Size(1920, 1080)) == 5 * 144 + 1 + 3 * 12  # 2 x 2
    assert Phi35(16).image_tokens(Size(1080, 1920)) == 16 * 144 + 1 + 6 * 12  # 3 x 5


def test_kimi_lets_a_target_alone():
    family = Kimi()
    assert family.image_tokens(VGA) == 23 * 18
    for size in sizes(6):
        target = family.target(size)
        assert (target.width // 14) * (target.height // 14) <= 4096
        assert family.target(target) == target


def test_deepseek_vl2_takes_the_frame_that_keeps_most():
    family = DeepSeekVL2()
    assert family.target(Size(4000, 1000)) == Size(1536, 384)
    assert family.target(Size(300, 200)) == Size(300, 200)
    assert family.image_tokens(Size(300, 200)) == 211 + 14 * 15
    custom = family_for(
        {"model_type": "deepseek_vl_v2", "candidate_resolutions": [[384, 384], [768, 384]]}
    )
    assert custom.image_tokens(Size(2000, 1000)) == 211 + 14 * 29


def test_shrinking_keeps_the_shape():
    assert shrink_to_pixels(Size(4000, 1000), 1_000_000) == Size(2000, 500)
    assert shrink_to_pixels(Size(10_000, 1), 100) == Size(100, 1)
    assert shrink_to_pixels(VGA, VGA.pixels) == VGA
    assert shrink_into(Size(4000, 1000), Size(800, 800)) == Size(800, 200)
    assert shrink_into(VGA, HD) == VGA
    assert at_most(HD, 448) == Size(448, 448)
    assert at_most(Size(100, 500), 448) == Size(100, 448)
