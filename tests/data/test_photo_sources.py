"""Sources of photos: HEIC and AVIF, zip files, URLs, cutouts, and where the crop goes."""

import http.server
import ssl
import threading
import zipfile

import numpy as np
import pillow_heif
import pytest
import trustme
from PIL import Image

from catversion_jax.data import concept_sets, photo_sources
from catversion_jax.data.images import open_photo
from catversion_jax.data.photos import DataConfig, centering_on, count_photos, training_photos
from catversion_jax.utils.errors import StorageError, UserError

TEAPOT = concept_sets.SHIPPED / "teapot" / "train"
pillow_heif.register_heif_opener()


def ramp(width: int = 48, height: int = 32) -> Image.Image:
    """Red to the right, green downwards: every corner differs."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 250, width)[None]
    image[..., 1] = np.linspace(0, 250, height)[:, None]
    return Image.fromarray(image)


@pytest.mark.parametrize("ending", ["heic", "avif"])
def test_phones_formats(tmp_path, ending):
    ramp().save(tmp_path / f"a.{ending}", quality=95)
    read = np.asarray(open_photo(tmp_path / f"a.{ending}"), int)
    assert np.abs(read - np.asarray(ramp(), int)).mean() < 6
    (photo,) = training_photos(DataConfig(dir=str(tmp_path)), 32)
    assert photo.image.shape == (32, 32, 3)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_heic_of_a_turned_phone(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = ramp()
    stored.save(tmp_path / "a.heic", quality=95, exif=exif.tobytes())
    stored.save(tmp_path / "a.png", exif=exif.tobytes())
    heic, png = (np.asarray(open_photo(tmp_path / f"a.{ending}"), int) for ending in ("heic", "png"))
    assert heic.shape == png.shape
    assert np.abs(heic - png).mean() < 6


def test_a_heic_beside_its_jpeg_is_not_a_second_photo(tmp_path, caplog):
    for ending in ("heic", "jpg"):
        ramp().save(tmp_path / f"IMG_1.{ending}")
    assert len(training_photos(DataConfig(dir=str(tmp_path)), 32)) == 1
    assert "files that are no photos are not used: IMG_1.heic" in caplog.text


def same(source: object, expected: list, **settings) -> None:
    found = training_photos(DataConfig(dir=str(source), **settings), 64)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.image, theirs.image)
        assert (ours.mask is None) == (theirs.mask is None)


def photo_count(source) -> int:
    return count_photos(DataConfig(dir=str(source))).photos


@pytest.fixture(scope="module")
def expected():
    return training_photos(DataConfig(dir=str(TEAPOT)), 64)


@pytest.mark.parametrize("folder", ["", "photos/"])
def test_zip_files(tmp_path, expected, folder):
    """Of the photos, or of a folder of them, with what macOS puts beside."""
    with zipfile.ZipFile(tmp_path / "mug.zip", "w") as archive:
        for path in sorted(TEAPOT.glob("*.png")):
            archive.write(path, f"{folder}{path.name}")
            archive.writestr(f"__MACOSX/{folder}._{path.name}", b"notes")
    same(tmp_path / "mug.zip", expected)
    assert photo_count(tmp_path / "mug.zip") == len(expected)


def test_a_zip_file_with_masks(tmp_path):
    masks = TEAPOT.parent / "train_masks"
    with zipfile.ZipFile(tmp_path / "mug.zip", "w") as archive:
        for path in sorted(TEAPOT.glob("*.png")):
            archive.write(path, path.name)
            archive.write(masks / path.name, f"masks/{path.name}")
    same(tmp_path / "mug.zip", training_photos(DataConfig(dir=str(TEAPOT), masks_dir=str(masks)), 64))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../a.png"], "the name '../a.png' leads out of it"),
        (["/etc/a.png"], "the name '/etc/a.png' leads out of it"),
        ([f"{i}.png" for i in range(1001)], "1001 files of 0 MiB; expected at most 1000"),
        ([], "0 photos"),
    ],
)
def test_zip_files_that_are_refused(tmp_path, names, message):
    with zipfile.ZipFile(tmp_path / "mug.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with pytest.raises(UserError) as error:
        training_photos(DataConfig(dir=str(tmp_path / "mug.zip")), 64)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "mug.zip")), "and not the temporary folder"


def test_a_damaged_zip_file(tmp_path):
    (tmp_path / "mug.zip").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"mug\.zip: not a readable zip file"):
        training_photos(DataConfig(dir=str(tmp_path / "mug.zip")), 64)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An https:// server of the teapot's photos, whose certificate this process trusts."""
    authority = trustme.CA()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(TEAPOT))

        def do_GET(self):
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.1/x.png")
                return self.end_headers()
            return super().do_GET()

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    found.socket = context.wrap_socket(found.socket, server_side=True)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    yield f"https://127.0.0.1:{found.server_port}"
    found.shutdown()


def test_urls(tmp_path, server, expected):
    urls = [f"{server}/{path.name}?size=full" for path in sorted(TEAPOT.glob("*.png"))]
    same(",".join(urls), expected)
    (tmp_path / "urls.txt").write_text("# mine\n" + "\n".join(urls) + "\n")
    same(tmp_path / "urls.txt", expected)
    assert photo_count(tmp_path / "urls.txt") == len(expected)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/none.png", UserError, "the server answers 404"),
        ("/away", UserError, r"leads to http://127\.0\.0\.1/x\.png, which is no https:// URL"),
    ],
)
def test_urls_that_give_nothing(server, path, error, message):
    with pytest.raises(error, match=message):
        training_photos(DataConfig(dir=server + path), 64)


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(photo_sources, "TIMEOUT", 2)
    with pytest.raises(StorageError, match="not downloaded"):
        training_photos(DataConfig(dir="https://127.0.0.1:9/a.png"), 64)


def test_a_list_of_something_else(tmp_path):
    (tmp_path / "urls.txt").write_text("ftp://host/a.png")
    with pytest.raises(UserError, match=r"ftp://host/a\.png: no https:// URL"):
        training_photos(DataConfig(dir=str(tmp_path / "urls.txt")), 64)


def cutout(path, left: int) -> None:
    """A white photo of 96x32 with a red subject of 16x16 at `left`, the rest transparent."""
    image = np.zeros((32, 96, 4), np.uint8)
    image[8:24, left : left + 16] = (200, 30, 30, 255)
    Image.fromarray(image).save(path)


def test_cutouts_are_their_own_masks_and_the_crop_keeps_the_subject(tmp_path):
    cutout(tmp_path / "a.png", 2)
    cutout(tmp_path / "b.png", 78)
    for photo in training_photos(DataConfig(dir=str(tmp_path)), 32):
        assert photo.mask.sum() == 16 * 16, "all of the subject is in the square"
        np.testing.assert_array_equal(photo.image[photo.mask], np.broadcast_to((200, 30, 30), (256, 3)))
        np.testing.assert_array_equal(photo.image[~photo.mask], 255)
    for photo in training_photos(DataConfig(dir=str(tmp_path), crop="center"), 32):
        assert photo.mask.sum() == 0, "the center has none of it"


def test_a_cutout_among_whole_photos(tmp_path, caplog):
    cutout(tmp_path / "a.png", 2)
    ramp().save(tmp_path / "b.png")
    assert all(photo.mask is None for photo in training_photos(DataConfig(dir=str(tmp_path)), 32))
    assert "cutouts beside whole photos count as whole, too: a" in caplog.text


@pytest.mark.parametrize(
    ("shape", "box", "expected"),
    [
        ((10, 30), (0, 10, 0, 6), (0.0, 0.5)),
        ((10, 30), (0, 10, 12, 18), (0.5, 0.5)),
        ((10, 30), (0, 10, 24, 30), (1.0, 0.5)),
        ((30, 10), (6, 12, 0, 10), (0.5, 0.2)),
        ((10, 10), (0, 2, 0, 2), (0.5, 0.5)),
        ((10, 30), (0, 0, 0, 0), (0.5, 0.5)),
    ],
)
def test_where_the_crop_goes(shape, box, expected):
    mask = np.zeros(shape, bool)
    mask[box[0] : box[1], box[2] : box[3]] = True
    assert centering_on(mask) == pytest.approx(expected)
