"""POST /v1/files: a form in several parts, written to the disk as it comes.

The form is fed piece by piece, by any thread; nothing of it but the short fields is held in memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from qaic_ray.files.documents import shown
from qaic_ray.serve.api_errors import bad_request
from qaic_ray.serve.batches.file_store import (
    INPUT_KEPT_S,
    PURPOSE_INPUT,
    FileRecord,
    FileStore,
    NewFile,
    kept_seconds,
)

FIELDS = ("purpose", "file", "expires_after[anchor]", "expires_after[seconds]")
FORM_BYTES = 2**16
"""Of a form beside its file: fields and what separates them."""
_MAX_FIELD_BYTES = 1024


class UploadForm(AbstractContextManager["UploadForm"]):
    """A form that is being read, and its file that is being written.

    Args:
        store: takes the file.
        content_type: the request's header.

    Raises:
        ApiError: 400, the header is not that of such a form.
    """

    def __init__(self, store: FileStore, content_type: str) -> None:
        kind, options = parse_options_header(content_type.encode())
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise bad_request("The body is a form, multipart/form-data, with file and purpose.")
        self._store = store
        self._fields: dict[str, bytes] = {}
        self._file: NewFile | None = None
        self._header = self._value = b""
        self._disposition = b""
        self._part = ""
        self._is_over = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._data,
                "on_end": self._end,
            },
        )

    def __exit__(self, *_: object) -> None:
        """Drop the file, if it was not taken."""
        if self._file is not None:
            self._file.__exit__(None, None, None)

    def feed(self, data: bytes) -> None:
        """Take the next piece of the body.

        Raises:
            ApiError: the form or its file is refused.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise bad_request(f"The form cannot be read: {error}.") from error

    def finish(self) -> FileRecord:
        """The whole body was fed: take the file.

        Raises:
            ApiError: 400, by the field; 507 where the disk refuses.
        """
        if not self._is_over:
            raise bad_request("The form ends before its last part does.")
        fields = {name: value.decode(errors="replace") for name, value in self._fields.items()}
        purpose = fields.get("purpose")
        if purpose is None:
            raise bad_request("purpose is missing.", "purpose")
        if purpose != PURPOSE_INPUT:
            raise bad_request(
                f"purpose is {shown(purpose)}: files are taken for batch alone.", "purpose"
            )
        if self._file is None:
            raise bad_request("file is missing.", "file")
        if self._file.num_bytes == 0:
            raise bad_request("file is empty.", "file")
        kept_s = INPUT_KEPT_S
        anchor, seconds = (fields.get(name) for name in FIELDS[2:])
        if anchor is not None or seconds is not None:
            kept_s = kept_seconds("expires_after", anchor, seconds)
        return self._file.finish(kept_s)

    # -- of the parser

    def _begin_part(self) -> None:
        self._disposition = b""
        self._part = ""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._part = options.get(b"name", b"").decode(errors="replace")
        if self._part not in FIELDS:
            raise bad_request(
                f"Unknown field {shown(self._part)}: the form has {', '.join(FIELDS)}.", self._part
            )
        if self._part in self._fields or (self._part == "file" and self._file is not None):
            raise bad_request(f"{self._part} is there twice: keep one of them.", self._part)
        if self._part == "file":
            name = options.get(b"filename", b"").decode(errors="replace")
            self._file = self._store.begin(name, PURPOSE_INPUT, is_given=True)
        else:
            self._fields[self._part] = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._part == "file":
            assert self._file is not None
            self._file.write(piece)
            return
        self._fields[self._part] += piece
        if len(self._fields[self._part]) > _MAX_FIELD_BYTES:
            raise bad_request(f"{self._part} is longer than {_MAX_FIELD_BYTES} bytes.", self._part)

    def _end(self) -> None:
        self._is_over = True
