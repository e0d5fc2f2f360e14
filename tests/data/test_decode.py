"""Image files of every kind -> pixels, by simplejpeg and by Pillow alone."""

import pickle

import numpy as np
import pytest
from PIL import Image

from advprop_jax.data import decode as decoding
from advprop_jax.data.decode import BrokenImage, Encoded, decode, decode_at_least, size_of
from tests.photographs import encode, opened, photograph

EXIF = Image.Exif()
EXIF[0x0112] = 6                                   # orientation: lies on its side
KINDS = {
    "4:4:4": {"subsampling": 0}, "4:2:2": {"subsampling": 1}, "4:2:0": {"subsampling": 2},
    "quality 20": {"quality": 20}, "quality 100": {"quality": 100},
    "progressive": {"progressive": True}, "restarts": {"restart_marker_blocks": 3},
    "not YCbCr": {"keep_rgb": True}, "EXIF": {"exif": EXIF},
}


@pytest.fixture(params=["simplejpeg", "Pillow"], autouse=True)
def decoder(request, monkeypatch):
  """Every test runs with simplejpeg, and as if it were not installed."""
  if request.param == "Pillow":
    monkeypatch.setattr(decoding, "simplejpeg", None)
  else:
    pytest.importorskip("simplejpeg")
  return request.param


@pytest.fixture
def pillow_reads(monkeypatch):
  """What Pillow is asked to decode, in a list that grows."""
  read, by_pillow = [], decoding._decode_by_pillow
  monkeypatch.setattr(decoding, "_decode_by_pillow",
                      lambda *args: (read.append(args[0]), by_pillow(*args))[1])
  return read


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(("height", "width"), [(120, 161), (33, 17), (1, 1)])
def test_a_jpeg_is_what_pillow_makes_of_it(kind, height, width, decoder, pillow_reads):
  """Catches fast transforms and colour upsampling, BGR, EXIF applied, and Pillow used for all."""
  file = encode(photograph(height, width), **KINDS[kind])
  image = decode(file)
  assert (image.shape, image.dtype, size_of(file)) == ((height, width, 3), np.uint8,
                                                       (height, width))
  np.testing.assert_array_equal(image, np.asarray(opened(file)))
  assert len(pillow_reads) == (decoder == "Pillow")


def test_colours_are_right():
  """Catches what the test above cannot: an error that Pillow would share, or channels swapped."""
  image = np.zeros((40, 60, 3), np.uint8)
  image[:20], image[20:, :30], image[20:, 30:] = (250, 10, 20), (10, 240, 30), (20, 30, 245)
  for settings in ({}, {"progressive": True}, {"subsampling": 0}):
    error = np.abs(decode(encode(image, quality=95, **settings)).astype(int) - image)
    assert np.median(error) <= 3
    assert error.mean() < 8                        # some blur of colours at the edges


def test_grey_is_repeated():
  grey = photograph(45, 70)[..., 0]
  image = decode(encode(grey))
  assert image.shape == (45, 70, 3)
  np.testing.assert_array_equal(image, np.repeat(image[..., :1], 3, axis=2))
  assert np.abs(image[..., 0].astype(int) - grey).mean() < 6


def test_cmyk_as_adobe_writes_it():
  """Adobe writes CMYK inverted, and some as YCCK; taken another way, red becomes cyan."""
  file = encode(Image.new("CMYK", (32, 24), (0, 255, 255, 0)))
  marker = file.index(b"\xff\xee\0\x0eAdobe")
  assert decode(file).shape == (24, 32, 3)
  assert decode(file)[12, 16].tolist() == pytest.approx([255, 0, 0], abs=4)
  without = decode(file[:marker] + file[marker + 16:])         # nobody writes it otherwise
  np.testing.assert_array_equal(without, decode(file))
  # The channels are 255 0 0 255: as YCCK, YCbCr of (75, 390, 28), clipped, which is 255 - CMY.
  ycck = decode(file[:marker + 15] + b"\2" + file[marker + 16:])
  assert ycck[12, 16].tolist() == pytest.approx([255 - 75, 0, 255 - 28], abs=4)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP", "GIF"])
def test_other_formats_go_by_their_content(file_format):
  """ImageNet has a PNG whose name ends in .JPEG: names play no part."""
  file = encode(photograph(30, 41), file_format)
  assert size_of(file) == (30, 41)
  np.testing.assert_array_equal(decode(file), np.asarray(opened(file)))
  pixels, factor = decode_at_least(file, 0.1)
  assert (pixels.shape, factor) == ((30, 41, 3), 1)


def test_orientation_is_applied_where_it_is_asked_for():
  file = encode(photograph(40, 70), exif=EXIF)
  assert decode(file).shape == (40, 70, 3)
  np.testing.assert_array_equal(decode(file, upright=True), np.rot90(decode(file), -1))


def test_pixels_are_given_back():
  image = photograph(6, 5)
  assert decode(image) is image
  assert (decode_at_least(image, 0.01)[0] is image, size_of(image)) == (True, (6, 5))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.2, 0.6, 0.99])
def test_a_jpeg_that_ends_early_is_refused(part, progressive):
  """Catches half an image of grey, which libjpeg gives with nothing but a warning."""
  file = encode(photograph(150, 200), progressive=progressive)
  cut = file[:int(part * len(file))]
  with pytest.raises(BrokenImage) as caught:
    decode(cut)
  assert caught.value.args[0]
  with pytest.raises(BrokenImage):
    decode_at_least(cut, 0.2)
  whole = Encoded(cut, "the file 'cat/1.JPEG' does not decode", "mend or remove it")
  with pytest.raises(BrokenImage,
                     match=r"^the file 'cat/1.JPEG' does not decode \(.+\): mend or remove it$"):
    decode(whole)


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_no_image_at_all(content):
  for action in (decode, size_of, lambda content: decode_at_least(content, 0.5)):
    with pytest.raises(BrokenImage, match=r"."):
      action(content)


def test_damage_within_a_file_is_judged_as_pillow_does():
  """Catches a file that one machine trains on and another, without simplejpeg, refuses."""
  file, rng, refused = encode(photograph(100, 140)), np.random.default_rng(0), 0
  for _ in range(40):
    damaged = bytearray(file)
    for place in rng.integers(2, len(file), 3):
      damaged[place] = rng.integers(256)
    try:
      expected = np.asarray(opened(bytes(damaged)))
    except Exception:
      refused += 1
      with pytest.raises(BrokenImage):
        decode(bytes(damaged))
    else:
      np.testing.assert_array_equal(decode(bytes(damaged)), expected)
  assert 0 < refused < 40


@pytest.mark.parametrize(("share", "factor"), [
    (1.5, 1), (1.0, 1), (0.51, 1), (0.5, 2), (0.26, 2), (0.25, 4), (0.13, 4), (0.125, 8), (0.0, 8)])
def test_no_more_is_decoded_than_needed(share, factor):
  """Catches a factor that leaves too few pixels, and one of another decoder's own choice."""
  file = encode(photograph(203, 301))
  pixels, found = decode_at_least(file, share)
  assert found == factor
  assert pixels.shape == (-(-203 // factor), -(-301 // factor), 3)


@pytest.mark.parametrize("settings", [{}, {"subsampling": 0}, {"progressive": True}])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_smaller_image_shows_the_same_place(factor, settings, monkeypatch):
  """Its pixels are the means of factor x factor ones; shifted by one they would not be."""
  file = encode(photograph(240, 320), **settings)
  pixels, _ = decode_at_least(file, 1 / factor)
  whole = decode(file).astype(float)
  means = whole.reshape(240 // factor, factor, 320 // factor, factor, 3).mean(axis=(1, 3))
  error = np.abs(pixels - means)[1:-1, 1:-1].mean()
  assert error < 2.0
  for axis in (0, 1):
    for shift in (-1, 1):
      assert np.abs(np.roll(pixels, shift, axis) - means)[1:-1, 1:-1].mean() > 2 * error
  monkeypatch.setattr(decoding, "simplejpeg", None)
  np.testing.assert_array_equal(decode_at_least(file, 1 / factor)[0], pixels)


def test_a_smaller_cmyk_image():
  file = encode(Image.fromarray(photograph(101, 150)).convert("CMYK"))
  pixels, factor = decode_at_least(file, 0.5)
  assert (pixels.shape, factor) == ((51, 75, 3), 2)
  halves = np.asarray(opened(file).resize((75, 51), Image.Resampling.BOX)).astype(int)
  assert np.abs(pixels - halves).mean() < 4


def test_encoded_images_can_be_pickled():
  """Worker processes may send them; what they say of themselves has to come along."""
  image = pickle.loads(pickle.dumps(Encoded(b"content", "the record 3 is broken", "mend it")))
  assert (type(image), image) == (Encoded, b"content")
  with pytest.raises(BrokenImage, match=r"^the record 3 is broken .*: mend it$"):
    decode(image)
