"""llama.cpp's C API for the tests of GGUF files, from the library in the package xllamacpp (PyPI, prebuilt)."""

import ctypes
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

IMAGE_CHUNK = 1
MARKER = "<__media__>"
OTHER_TYPES = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}
"""What a matrix gets whose rows do not divide by 256: tensor_type_fallback in src/llama-quant.cpp."""


class Parameters(ctypes.Structure):
    """A struct of parameters, as its default function fills it: only its size has to be enough."""

    _fields_ = (("content", ctypes.c_uint8 * 1024),)


class InputText(ctypes.Structure):
    """mtmd_input_text."""

    _fields_ = (
        ("text", ctypes.c_char_p),
        ("text_len", ctypes.c_size_t),
        ("add_special", ctypes.c_bool),
        ("parse_special", ctypes.c_bool),
    )


def library() -> ctypes.CDLL:
    """The library, with the types of the functions that are called here."""
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    lib = ctypes.CDLL(str(Path(spec.origin).with_name("xllamacpp.abi3.so")))
    pointer, text, number, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_size_t
    long = ctypes.c_int64
    types: dict[str, tuple[Any, Sequence[Any]]] = {
        "llama_backend_init": (None, ()),
        "llama_model_default_params": (Parameters, ()),
        "llama_model_load_from_file": (pointer, (text, Parameters)),
        "llama_context_default_params": (Parameters, ()),
        "llama_init_from_model": (pointer, (pointer, Parameters)),
        "llama_batch_get_one": (Parameters, (pointer, number)),
        "llama_decode": (number, (pointer, Parameters)),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (pointer, number)),
        "llama_free": (None, (pointer,)),
        "llama_model_free": (None, (pointer,)),
        "mtmd_context_params_default": (Parameters, ()),
        "mtmd_init_from_file": (pointer, (text, pointer, Parameters)),
        "mtmd_bitmap_init": (pointer, (ctypes.c_uint32, ctypes.c_uint32, text)),
        "mtmd_input_chunks_init": (pointer, ()),
        "mtmd_tokenize": (number, (pointer, pointer, ctypes.POINTER(InputText), ctypes.POINTER(pointer), size)),
        "mtmd_input_chunks_size": (size, (pointer,)),
        "mtmd_input_chunks_get": (pointer, (pointer, size)),
        "mtmd_input_chunk_get_type": (number, (pointer,)),
        "mtmd_input_chunk_get_n_tokens": (size, (pointer,)),
        "mtmd_input_chunk_get_tokens_text": (ctypes.POINTER(number), (pointer, ctypes.POINTER(size))),
        "mtmd_encode_chunk": (number, (pointer, pointer)),
        "mtmd_get_output_embd": (ctypes.POINTER(ctypes.c_float), (pointer,)),
        "mtmd_helper_eval_chunks": (
            number,
            (pointer, pointer, pointer, number, number, number, ctypes.c_bool, ctypes.POINTER(number)),
        ),
        "mtmd_free": (None, (pointer,)),
        "ggml_quantize_chunk": (size, (number, pointer, pointer, long, long, long, pointer)),
    }
    for name, (result, arguments) in types.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_backend_init()
    return lib


def write_q4_k_m(source: Path, path: Path) -> float:
    """Write a file with F16 matrices again as Q4_K_M, and return its bits a weight.

    The quantiser is ggml's. The library lacks `llama_model_quantize`, so `q4_k_m_type` says which type a matrix gets.
    """
    lib, reader, writer = library(), GGUFReader(source), GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            of = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=of)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_K_M)
    names = {one.name for one in reader.tensors}
    layers = sum(name.endswith("attn_v.weight") for name in names)
    num_bytes = weights = 0
    for one in reader.tensors:
        data, stored = one.data, one.tensor_type
        if data.ndim == 2:
            stored = q4_k_m_type(one.name, data.shape[1], layers=layers, tied="output.weight" not in names)
            data = _quantised(lib, data.astype(np.float32), stored)
        writer.add_tensor(one.name, data, raw_dtype=stored)
        num_bytes, weights = num_bytes + data.nbytes, weights + one.n_elements
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 8 * num_bytes / weights


def q4_k_m_type(name: str, columns: int, *, layers: int, tied: bool) -> GGMLQuantizationType:
    """The type of a Llama's matrix: llama_tensor_get_type_impl in src/llama-quant.cpp, for fewer than 80 layers."""
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    is_head = name == ("token_embd.weight" if tied else "output.weight")
    six = is_head or (more and ("attn_v" in name or "ffn_down" in name))
    kind = GGMLQuantizationType.Q6_K if six else GGMLQuantizationType.Q4_K
    return kind if columns % 256 == 0 else OTHER_TYPES[kind]


def _quantised(lib: ctypes.CDLL, values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """The bytes of each row of a matrix (R, C)."""
    rows, columns = values.shape
    out = np.zeros((rows, values.nbytes // rows), np.uint8)  # more than enough
    pointers = (values.ctypes.data, out.ctypes.data)
    used = lib.ggml_quantize_chunk(int(kind), *pointers, 0, rows, columns, None)
    return out.reshape(-1)[:used].reshape(rows, -1)


class LlamaCpp:
    """A model's two GGUF files in llama.cpp; V tokens, D dimensions."""

    def __init__(self, folder: Path, *, rows: int, width: int) -> None:
        """`rows` and `width` are V and D of the model."""
        self.lib, self.rows, self.width = library(), rows, width
        self.model = self.lib.llama_model_load_from_file(
            str(folder / "model.gguf").encode(), self.lib.llama_model_default_params()
        )
        assert self.model, "model.gguf is not loaded"
        self.vision = self.lib.mtmd_init_from_file(
            str(folder / "mmproj.gguf").encode(), self.model, self.lib.mtmd_context_params_default()
        )
        assert self.vision, "mmproj.gguf is not loaded"

    def close(self) -> None:
        """Free the model."""
        self.lib.mtmd_free(self.vision)
        self.lib.llama_model_free(self.model)

    def chunks(self, text: str, images: Sequence[NDArray[np.uint8]]) -> Any:
        """Text with a marker for each image (H, W, 3), tokenised."""
        bitmaps = (ctypes.c_void_p * max(1, len(images)))()
        for number, image in enumerate(images):
            bitmaps[number] = self.lib.mtmd_bitmap_init(image.shape[1], image.shape[0], image.tobytes())
        chunks = self.lib.mtmd_input_chunks_init()
        stated = InputText(text.encode(), len(text.encode()), False, True)
        code = self.lib.mtmd_tokenize(self.vision, chunks, ctypes.byref(stated), bitmaps, len(images))
        assert code == 0, f"mtmd_tokenize ended with {code}"
        return chunks

    def ids(self, chunks: Any, *, image_id: int) -> list[int]:
        """The tokens of chunks, with `image_id` for each vector of an image."""
        ids: list[int] = []
        for chunk in self._each(chunks):
            count = ctypes.c_size_t(self.lib.mtmd_input_chunk_get_n_tokens(chunk))
            if self.lib.mtmd_input_chunk_get_type(chunk) == IMAGE_CHUNK:
                ids += [image_id] * count.value
            else:
                tokens = self.lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                ids += tokens[: count.value]
        return ids

    def features(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The projected features (P, D) of an image."""
        chunk = next(
            one
            for one in self._each(self.chunks(MARKER, [image]))
            if self.lib.mtmd_input_chunk_get_type(one) == IMAGE_CHUNK
        )
        assert self.lib.mtmd_encode_chunk(self.vision, chunk) == 0
        count = self.lib.mtmd_input_chunk_get_n_tokens(chunk)
        return self._array(self.lib.mtmd_get_output_embd(self.vision), (count, self.width))

    def logits(self, chunks: Any, answer: Sequence[int]) -> NDArray[np.float32]:
        """The logits (len(answer) + 1, V) after a prompt and after each token of an answer."""
        context = self.lib.llama_init_from_model(self.model, self.lib.llama_context_default_params())
        past = ctypes.c_int32(0)
        assert self.lib.mtmd_helper_eval_chunks(self.vision, context, chunks, 0, 0, 512, True, ctypes.byref(past)) == 0
        out = [self._array(self.lib.llama_get_logits_ith(context, -1), (self.rows,))]
        for token in answer:
            one = (ctypes.c_int32 * 1)(token)
            assert self.lib.llama_decode(context, self.lib.llama_batch_get_one(one, 1)) == 0
            out.append(self._array(self.lib.llama_get_logits_ith(context, -1), (self.rows,)))
        self.lib.llama_free(context)
        return np.stack(out)

    def _each(self, chunks: Any) -> list[Any]:
        return [
            self.lib.mtmd_input_chunks_get(chunks, number) for number in range(self.lib.mtmd_input_chunks_size(chunks))
        ]

    def _array(self, pointer: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return np.ctypeslib.as_array(pointer, shape=shape).copy()
