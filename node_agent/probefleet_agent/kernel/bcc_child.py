"""The process in which BCC compiles: source in on stdin, one JSON object out on stdout; LLVM's memory ends with it.

Run by ``bcc.compile`` through ``probefleet_wire.sandbox`` as its script: by then the process is locked in, without
rights, and ``install_filter`` and ``FILTER`` are given. Only libbcc.so is used, not BCC's Python package, which would
load programs. libbcc creates maps while it compiles, by bpf(2). Here it must not: its bpf(2) calls are handed by
seccomp to a second thread, which notes the map's attributes and the BTF and answers with numbers that are no
descriptors. They come back in the instructions (``ld_imm64`` with pseudo source 1), and so name the map. The kernel is
never asked.

seccomp(2), SECCOMP_RET_USER_NOTIF (Linux 5.0); the layout of bpf_attr is include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import json
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

# Given by the sandbox, whose script this is.
install_filter: Callable[..., int] = globals()["install_filter"]
FILTER: bytes = globals()["FILTER"]

FIRST_FD = 1 << 20  # no descriptor of this process is that high
MAP_CREATE, PROG_LOAD, BTF_LOAD = 0, 5, 18
KPROBE = 2
BPF = {"x86_64": 321, "aarch64": 280}
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTIFICATION = struct.Struct("<QIIiIQ6Q")
_ANSWER = struct.Struct("<QqiI")
_MAP = struct.Struct("<7I16s4I")
_BTF = struct.Struct("<QQI")
_INFO = struct.Struct("<IQIIQI")  # record size, address and count: of functions, then of lines
_INFO_OFFSET = 76
MAX_BTF_BYTES = 16 << 20


class Kernel:
    """Plays bpf(2) for the compiling thread."""

    def __init__(self) -> None:
        self.maps: dict[int, dict[str, int]] = {}
        self.btf = b""
        self.info: dict[str, Any] = {}  # functions and lines of the program that was loaded last
        self._next = FIRST_FD

    def serve(self, listener: int) -> None:
        """Answer one call after the other until the process ends."""
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(_NOTIFICATION.size)
        while True:
            ctypes.memset(buffer, 0, _NOTIFICATION.size)  # the kernel wants it so
            if libc.ioctl(listener, ctypes.c_ulong(_RECEIVE), buffer) < 0:
                if ctypes.get_errno() in (errno.EINTR, errno.ENOENT):
                    continue
                os._exit(125)
            call = _NOTIFICATION.unpack(buffer.raw)
            result = self.bpf(call[6], call[7], call[8])
            answer = _ANSWER.pack(call[0], max(result, 0), min(result, 0), 0)
            libc.ioctl(listener, ctypes.c_ulong(_SEND), ctypes.create_string_buffer(answer))

    def bpf(self, command: int, attr: int, size: int) -> int:
        """The result of one call, or minus an errno. The attributes lie in this very process."""
        given = ctypes.string_at(attr, min(size, 256)).ljust(256, b"\0")
        if command == MAP_CREATE:
            words = _MAP.unpack_from(given)
            names = ("type", "key_bytes", "value_bytes", "max_entries", "flags", "inner_fd", "numa_node")
            made = dict(zip(names, words[:7], strict=True))
            made |= {"key_type": words[10], "value_type": words[11]}
            self.maps[self._next] = made
        elif command == BTF_LOAD:
            address, _, length = _BTF.unpack_from(given)
            if length > MAX_BTF_BYTES:
                return -errno.E2BIG
            self.btf = ctypes.string_at(address, length)
        elif command == PROG_LOAD:
            function_bytes, functions, count, line_bytes, lines, line_count = _INFO.unpack_from(given, _INFO_OFFSET)
            if max(function_bytes * count, line_bytes * line_count) > MAX_BTF_BYTES:
                return -errno.E2BIG
            if count and line_count:  # libbpf tries programs of its own as well
                self.info = {
                    "function_record_bytes": function_bytes,
                    "function_records": base64.b64encode(ctypes.string_at(functions, function_bytes * count)).decode(),
                    "line_record_bytes": line_bytes,
                    "line_records": base64.b64encode(ctypes.string_at(lines, line_bytes * line_count)).decode(),
                }
        else:
            return -errno.EPERM
        self._next += 1
        return self._next - 1


def _filters() -> tuple[bytes, bytes]:
    """(hand bpf(2) to the listener, refuse bpf(2)): two lines of classic BPF over seccomp_data.nr."""
    number = BPF[platform.machine()]

    def on_bpf(action: int) -> bytes:
        rows = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, action), (0x06, 0, 0, 0x7FFF0000)]
        return b"".join(struct.pack("<HBBI", *row) for row in rows)

    return on_bpf(0x7FC00000), on_bpf(0x00050000 | errno.EPERM)


def lock_in(kernel: Kernel) -> None:
    """Filters for this thread and for the one that answers; each has its own."""
    hand_over, refuse = _filters()
    ready = threading.Event()
    listeners: list[int] = []

    def answer() -> None:
        ready.wait()
        install_filter(refuse)
        install_filter(FILTER)
        kernel.serve(listeners[0])

    threading.Thread(target=answer, name="bpf", daemon=True).start()
    listeners.append(install_filter(hand_over, listener=True))
    install_filter(FILTER)
    ready.set()


def library() -> ctypes.CDLL:
    """libbcc with the signatures that are used; they are the same in 0.26 and 0.31."""
    lib = ctypes.CDLL("libbcc.so.0")
    text, pointer, size, index = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
    number, word = ctypes.c_int, ctypes.c_uint
    lib.bpf_module_create_c_from_string.restype = pointer
    lib.bpf_module_create_c_from_string.argtypes = [
        text, ctypes.c_uint, ctypes.POINTER(text), ctypes.c_int, ctypes.c_bool, text,
    ]  # fmt: skip
    for name, result, arguments in (
        ("bpf_num_functions", size, []),
        ("bpf_function_name", text, [index]),
        ("bpf_function_start_id", pointer, [index]),
        ("bpf_function_size_id", size, [index]),
        ("bpf_module_license", text, []),
        ("bpf_module_kern_version", ctypes.c_uint, []),
        ("bpf_num_tables", size, []),
        ("bpf_table_name", text, [index]),
        ("bpf_table_fd_id", ctypes.c_int, [index]),
        ("bpf_table_key_desc_id", text, [index]),
        ("bpf_table_leaf_desc_id", text, [index]),
        ("bpf_perf_event_fields", size, [text]),
        ("bpf_perf_event_field", text, [text, index]),
        (
            "bcc_func_load",
            number,
            [number, text, pointer, number, text, word, number, pointer, word, text, word, number],
        ),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, [pointer, *arguments]
    return lib


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "backslashreplace")


def line_information(lib: ctypes.CDLL, module: int, index: int, kernel: Kernel) -> dict[str, Any]:
    """Which instruction comes from which line. libbcc tells it to the kernel only, with a program: so it loads one."""
    kernel.info = {}
    lib.bcc_func_load(
        module, KPROBE, lib.bpf_function_name(module, index), lib.bpf_function_start_id(module, index),
        lib.bpf_function_size_id(module, index), b"GPL", lib.bpf_module_kern_version(module), 0, None, 0, None, 0, 0,
    )  # fmt: skip
    return kernel.info


def describe(lib: ctypes.CDLL, module: int, kernel: Kernel) -> dict[str, Any]:
    """What the compiled module holds."""
    functions = [
        {
            "name": _text(lib.bpf_function_name(module, index)),
            "instructions": base64.b64encode(
                ctypes.string_at(lib.bpf_function_start_id(module, index), lib.bpf_function_size_id(module, index))
            ).decode(),
            **line_information(lib, module, index, kernel),
        }
        for index in range(lib.bpf_num_functions(module))
    ]
    tables = []
    for index in range(lib.bpf_num_tables(module)):
        name, fd = lib.bpf_table_name(module, index), lib.bpf_table_fd_id(module, index)
        count = lib.bpf_perf_event_fields(module, name)
        tables.append(
            {
                "name": _text(name),
                "fd": fd,
                "key_desc": _text(lib.bpf_table_key_desc_id(module, index)),
                "leaf_desc": _text(lib.bpf_table_leaf_desc_id(module, index)),
                "event_fields": [_text(lib.bpf_perf_event_field(module, name, each)) for each in range(count)],
                **kernel.maps.get(fd, {}),
            }
        )
    return {
        "functions": functions,
        "tables": tables,
        "btf": base64.b64encode(kernel.btf).decode(),
        "licence": _text(lib.bpf_module_license(module)),
        "kernel_version": lib.bpf_module_kern_version(module),
    }


def main() -> None:
    """Compile what stdin says."""
    asked = json.load(sys.stdin)
    os.environ["BCC_KERNEL_SOURCE"] = asked["kernel_source"]
    lib = library()
    kernel = Kernel()
    lock_in(kernel)
    flags = [flag.encode() for flag in asked["cflags"]]
    array = (ctypes.c_char_p * len(flags))(*flags)
    module = lib.bpf_module_create_c_from_string(asked["source"].encode(), 0, array, len(flags), False, None)
    if module:
        os.write(1, b"\0")  # all that follows is the answer, whatever a library printed before it
        answer = memoryview(json.dumps(describe(lib, module, kernel)).encode())
        while answer:
            answer = answer[os.write(1, answer) :]
    # Not a return: libbcc's destructors would close numbers that are no descriptors.
    os._exit(0 if module else 1)


if __name__ == "__main__":
    main()
