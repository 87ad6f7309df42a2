#!/usr/bin/env python3
"""Writes the seeds of the fuzz targets, below 10 KiB each: tests/fuzz/make_seeds.py [FOLDER].

Some are sound files, some are damaged in ways that a reader may fall for. The ordinary tests read them too.
"""

import json
import pathlib
import struct
import sys

SEEDS = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "seeds")
NAN = float("nan")


def write(target, name, content):
    path = SEEDS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    assert len(content) < 10 * 1024, (name, len(content))
    path.write_bytes(content)


def safetensors(tensors, metadata=None, header=None):
    """`tensors`: {name: (dtype, shape, values)}; `header` replaces entries of the header."""
    head = {"__metadata__": metadata} if metadata is not None else {}
    data = b""
    for name, (dtype, shape, values) in tensors.items():
        code = {"F32": "f", "I32": "i", "I64": "q", "U8": "B"}[dtype]
        packed = struct.pack(f"<{len(values)}{code}", *values)
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(packed)]}
        data += packed
    head.update(header or {})
    text = json.dumps(head, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def json_seeds():
    text = '"\\u00e9\\ud83d\\ude00"'
    write("json", "object", '{"a": 1, "b": [true, false, null, -2.5e-3, ' + text + '], "c": {"a": {"a": []}}}')
    write("json", "fields", '{"a": [{"a": "text"}, {"a": [0.5, 1]}, {"a": [[0, 1], [-1, 0.25]]}, {"a": -5}]}')
    write("json", "numbers", "[0, -0, 1e308, 5e-324, 9223372036854775807, -9223372036854775808, 18446744073709551615]")
    write("json", "overflow", '{"a": 1e999}')
    write("json", "not_a_number", '{"a": NaN}')
    write("json", "infinity", '{"a": -Infinity}')
    write("json", "twice", '{"a": 1, "b": {"a": 2}, "a": 3}')
    write("json", "trailing", '{"a": 1} {')
    write("json", "cut", '{"a": [1, {"b": "te')
    write("json", "deep", "[" * 4000)
    write("json", "deep_objects", '{"a":' * 1500)
    write("json", "not_utf8", b'{"a": "\xff\xc0\x80"}')
    write("json", "nul", b'{"a\\u0000b": "\\u0000", "a\x00": 1}')
    write("json", "empty", "")


def gate(features):
    return {"means": [0.5] * features, "scales": [1.0] * features, "weights": [-0.25] * features, "intercept": 0.125}


def profile(early_exit="neighbour", **changes):
    features = 18 if early_exit == "neighbour" else 3
    content = {
        "format": "llmcache calibration",
        "version": 2,
        "budget": {"metric": "decision", "epsilon": 0.05, "delta": 0.1},
        "early_exit": early_exit,
        "model": "0123456789abcdef",
        "fitted": 32,
        "certified": 100,
        "certified_error": 0.01,
        "error_bound": 0.04,
        "expected_share": 0.5,
        "expected_exits": [0.5, 0],
        "typical_distance": 1.5,
        "bytes": 4096,
        "exit": {
            "tensors_xxh3": "0" * 16,
            "thresholds": [[0.25, -1], [0.125, -1]],
            "gates": [gate(features), {"means": [], "scales": [], "weights": [], "intercept": 0}],
        },
        "content_xxh3": "0" * 16,
    }
    for path, value in changes.items():
        place = content
        *folders, last = path.split("__")
        for folder in folders:
            place = place[int(folder) if folder.isdigit() else folder]
        place[int(last) if last.isdigit() else last] = value
    return json.dumps(content, indent=1)


def tensors(entries=32, hidden=2, values=2, bank=True, **changes):
    kept = {
        "outputs": ("F32", [entries, values], [0.5] * (entries * values)),
        "decisions": ("I64", [entries], [1] * entries),
        "mean_output": ("F32", [values], [0.5] * values),
        "layers.0.centre": ("F32", [hidden], [0.25] * hidden),
        "layers.0.translator": ("F32", [hidden, values], [1.0] * (hidden * values)),
    }
    if bank:
        kept["layers.0.states"] = ("F32", [entries, hidden], [0.75] * (entries * hidden))
        kept["layers.0.lengths"] = ("F32", [entries], [1.0] * entries)
        kept["layers.0.projection"] = ("F32", [hidden, 1], [1.0] * hidden)
        kept["layers.0.projected"] = ("F32", [entries, 1], [1.0] * entries)
    kept.update(changes)
    return kept


def profile_seeds():
    def both(name, text, beside=b""):
        write("profile", name, text.encode() + b"\0" + beside)

    sound = safetensors(tensors())
    both("neighbour", profile(), sound)
    both("cache_free", profile("cache-free"), safetensors(tensors(entries=0, bank=False)))
    reuse = {
        "format": "int8", "mechanism": "token reuse", "setting": "every 4th token", "limit": 0.3, "fitted": 100,
        "certified": 200, "error": 0.01, "bound": 0.04, "computed": 0.4, "typical_distance": 2.0,
    }  # fmt: skip
    verified = {"tokens": 64, "rows": 8, "padding": 16, "codes": [1, 2, 77]}
    without = json.loads(profile("off", reuse=reuse, verified=verified))
    del without["exit"]
    both("reuse", json.dumps(without))
    both("foreign", '{"format": "something else", "version": 2}')
    both("version", profile(version=3))
    both("negative_count", profile(fitted=-1), sound)
    both("count_no_number", profile(certified=1e300), sound)
    both("epsilon", profile(budget__epsilon=7), sound)
    both("delta", profile(budget__delta=0), sound)
    both("metric", profile(budget__metric="luck"), sound)
    both("scale", profile(exit__gates__0__scales=[0.0] * 18), sound)
    both("weight_null", profile(exit__gates__0__weights=[None] * 18), sound)
    both("threshold", profile(exit__thresholds__0=[-0.5, -1]), sound)
    both("thresholds_short", profile(exit__thresholds__0=[0.5]), sound)
    both("codes_fall", json.dumps({**without, "verified": {**verified, "codes": [2, 1]}}))
    both("nan_output", profile(), safetensors(tensors(mean_output=("F32", [2], [NAN, 0.0]))))
    both("inf_state", profile(), safetensors(tensors(**{"layers.0.centre": ("F32", [2], [float("inf"), 0.0])})))
    both("decision", profile(), safetensors(tensors(decisions=("I64", [32], [-1] * 32))))
    both("length", profile(), safetensors(tensors(**{"layers.0.lengths": ("F32", [32], [0.0] * 32)})))
    both("left_over", profile(), safetensors(tensors(more=("F32", [1], [1.0]))))
    both("few_entries", profile(), safetensors(tensors(entries=3)))
    both("cut", profile(), sound[:-5])
    both("appended", profile(), sound + b"more")
    huge = {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 256]}
    both("overflow", profile(), safetensors(tensors(), header={"outputs": huge}))
    hidden = {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}
    both("overflow_behind_zero", profile(), safetensors(tensors(), header={"more": hidden}))
    over = {"dtype": "F32", "shape": [2], "data_offsets": [252, 260]}
    both("overlap", profile(), safetensors(tensors(), header={"mean_output": over}))
    both("header_length", profile(), struct.pack("<Q", 2**64 - 1) + sound[8:])
    both("header_deep", profile(), struct.pack("<Q", 1000) + b"[" * 1000)


def token_file(metadata=None, header=None, **changes):
    words = {"workload": "w", "tokenizer": "t", "source": "s", "description": "d", "order": "as it was",
             "max_tokens": "512", "version": "2", **(metadata or {})}  # fmt: skip
    kept = {
        "tokens": ("I32", [12], list(range(12))),
        "sequence_offsets": ("I64", [5], [0, 3, 6, 9, 12]),
        "request_offsets": ("I64", [3], [0, 2, 4]),
        **changes,
    }
    return safetensors(kept, words, header)


def token_file_seeds():
    write("token_file", "plain", token_file({"version": "1"}))
    labels = ("I64", [4], [0, 1, 1, 0])
    classes = {"task": "classification", "label_names": '["a","b"]'}
    write("token_file", "classification", token_file(classes, labels=labels))
    scored = ("I64", [4, 2], [1, 3, 1, 2, 2, 3, 1, 3])
    write("token_file", "choice", token_file({"task": "choice"}, labels=("I64", [4], [0, 1, 1, 0]), scored=scored))
    write("token_file", "perplexity", token_file({"task": "perplexity"}, scored=scored))
    write("token_file", "similarity", token_file({"task": "similarity"}, pair_score=("F32", [2], [0.5, 4.0])))
    write("token_file", "answer", token_file({"task": "answer"}, group=("I64", [2], [3, -1])))
    write("token_file", "generation", token_file({"task": "generation", "new_tokens": "8", "stop_token": "2"}))
    ones = {"sequence_offsets": ("I64", [3], [0, 6, 12]), "request_offsets": ("I64", [3], [0, 1, 2])}
    pairs = {"partner": ("I64", [2], [-1, 0]), "pair_label": ("I64", [2], [-1, 1])}
    write("token_file", "duplicates", token_file({"task": "duplicates", "fill_requests": "1"}, **ones, **pairs))
    write("token_file", "pool", token_file(pool=("I64", [12], [0, 1] * 6)))
    answers = {
        **ones,
        "group": ("I64", [2], [0, -1]),
        "passage": ("I64", [2, 2], [2, 5, 1, 6]),
        "token_text": ("U8", [7], list(b"one two")),
        "token_text_offsets": ("I64", [13], [0, 0, 0, 3, 7, 7, 7, 7, 7, 7, 7, 7, 7]),
        "gold": ("U8", [4], list(b"two\n")),
        "gold_offsets": ("I64", [3], [0, 4, 4]),
    }
    write("token_file", "passages", token_file({"task": "answer"}, **answers))
    fall = {**answers, "token_text_offsets": ("I64", [13], [0, 0, 0, 7, 3, 7, 7, 7, 7, 7, 7, 7, 7])}
    write("token_file", "texts_fall", token_file({"task": "answer"}, **fall))
    far = {**answers, "gold_offsets": ("I64", [3], [0, 2**62, 2**62])}
    write("token_file", "gold_far", token_file({"task": "answer"}, **far))
    write("token_file", "nan_score", token_file({"task": "similarity"}, pair_score=("F32", [2], [NAN, 4.0])))
    write("token_file", "offsets_fall", token_file(sequence_offsets=("I64", [5], [0, 6, 3, 9, 12])))
    write("token_file", "offsets_far", token_file(request_offsets=("I64", [3], [0, 2, 2**62])))
    write("token_file", "names_deep", token_file({"task": "classification", "label_names": "[" * 4000}, labels=labels))
    huge = {"dtype": "I32", "shape": [2**62, 2**62], "data_offsets": [0, 48]}
    write("token_file", "overflow", token_file(header={"tokens": huge}))
    write("token_file", "overlap", token_file(header={"more": {"dtype": "U8", "shape": [9], "data_offsets": [1, 10]}}))
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(120)}
    write("token_file", "many_tensors", token_file(header=many))
    write("token_file", "cut", token_file()[:-9])
    write("token_file", "short", b"\0\0\0")


def snapshot_seeds():
    """Entries as they are: of whole files no seed has right checks for long, see snapshot_file_test.cpp."""

    def text(value):
        return struct.pack("<Q", len(value)) + value

    def numbers(code, values):
        return struct.pack(f"<Q{len(values)}{code}", len(values), *values)

    def tensors(*forms, data=b"\0" * 24):
        head = struct.pack("<I", len(forms))
        return head + b"".join(bytes([kind]) + numbers("q", sizes) for kind, sizes in forms) + data

    sound = tensors((8, [1, 2, 3]))
    output = text(b"key of a row") + struct.pack("<Bii", 1, 1, 2)
    prefix = text(b"tenant") + struct.pack("<IQ", 2, 1) + numbers("q", [1, 1, 2, 1, 3, 1]) + struct.pack("<BBf", 1, 2, 0.5)
    states = text(b"tenant") + struct.pack("<I", 1) + numbers("q", [5, 6, 7])
    counts = numbers("H", [1, 1, 4]) + struct.pack("<d", 2.5) + numbers("B", [0])
    write("snapshot", "output", output + sound)
    write("snapshot", "prefix", prefix + sound)
    write("snapshot", "states", states + counts + sound)
    segment = text(b"tenant") + struct.pack("<I", 1) + numbers("q", [5, 6, 7]) + struct.pack("<qHd", 40, 3, 0.5)
    centre = struct.pack("<Q", 20) + numbers("d", [1.5, -2]) + numbers("f", [0.5, 1])
    layer = struct.pack("<I", 2) + text(b"tenant") + numbers("f", [0.5, 2]) + numbers("B", [1, 0])
    layer += struct.pack("<Idd", 1, 0.25, 3.5) + tensors((8, [1, 2, 3]), (5, [2]), data=b"\0" * 40)
    write("snapshot", "segment", segment + sound)
    write("snapshot", "centres", struct.pack("<I", 1) + centre)
    write("snapshot", "centres_many", struct.pack("<I", 2**32 - 1) + centre)
    write("snapshot", "layer", layer)
    write("snapshot", "calibration", text(b"{}") + text(b""))
    write("snapshot", "file_head", b"LLMCSNAP" + struct.pack("<II", 1, 0))
    write("snapshot", "frame_far", b"LLMCSNAP" + struct.pack("<IIIIQQ", 1, 0, 1, 0, 2**63, 0) + b"\0" * 16)
    write("snapshot", "later", b"LLMCSNAP" + struct.pack("<II", 9, 0) + b"\0" * 64)
    write("snapshot", "sizes_overflow", output + tensors((8, [2**62, 2**62])))
    write("snapshot", "sizes_negative", output + tensors((8, [-1, -6])))
    write("snapshot", "key_far", struct.pack("<Q", 2**63) + output + sound)
    write("snapshot", "no_tokens", text(b"tenant") + struct.pack("<IQ", 0, 0) + numbers("q", []) + sound)
    write("snapshot", "half_a_token", text(b"tenant") + struct.pack("<IQ", 4, 0) + numbers("q", [1, 2, 3]) + sound)
    write("snapshot", "many_tensors", output + struct.pack("<I", 2**32 - 1))
    write("snapshot", "no_bool", output + tensors((10, [3]), data=b"\0\1\2"))
    write("snapshot", "header", '{"library": "0", "model": {"contents": "", "digest": ""}, "parts": [{"kind": -1}]}')
    write("snapshot", "empty", b"")


def exported(nodes=None, **changes):
    """A program of one layer, as torch.export writes it down."""

    def size(number):
        return {"as_expr": {"expr_str": f"Symbol('{number}', positive=True, integer=True)", "hint": None}}

    def tensor(name):
        return {"as_tensor": {"name": name}}

    def node(target, output, stack="L__self__,,Model", **inputs):
        return {
            "target": f"torch.ops.aten.{target}",
            "inputs": [{"name": name, "arg": value, "kind": 1} for name, value in inputs.items()],
            "outputs": [output],
            "metadata": {"nn_module_stack": stack},
            "name": target,
        }

    layer = "L__self__,,Model;L__self__layers.0,layers.0,Layer"
    program = {
        "schema_version": {"major": 8, "minor": 20},
        "torch_version": "2.13.0",
        "range_constraints": {"s0": {"min_val": 2, "max_val": None}, "s1": {"min_val": 2, "max_val": 512}},
        "guards_code": ["L['ids'].size()[1] <= 256", "L['mask'].size()[1] == L['ids'].size()[1]"],
        "graph_module": {
            "graph": {
                "tensor_values": {
                    "ids": {"dtype": 5, "sizes": [size("s0"), size("s1")]},
                    "mask": {"dtype": 5, "sizes": [size("s0"), size("s2")]},
                },
                "nodes": nodes if nodes is not None else [
                    node("sym_size.int", {"as_sym_int": {"as_name": "n"}}, self=tensor("ids"), dim={"as_int": 1}),
                    node("embedding.default", tensor("x"), weight=tensor("w"), indices=tensor("ids")),
                    node("chunk.default", {"as_tensors": [{"name": "a"}, {"name": "b"}]}, layer, self=tensor("x"),
                         chunks={"as_int": 2}, dim={"as_int": -1}),
                    node("view.default", tensor("y"), layer, self=tensor("a"),
                         size={"as_sym_ints": [{"as_int": -1}, {"as_name": "n"}, {"as_int": 4}]}),
                    node("cat.default", tensor("z"), tensors={"as_tensors": [{"name": "y"}, {"name": "b"}]}),
                ],
            },
            "signature": {
                "input_specs": [
                    {"parameter": {"arg": {"name": "w"}, "parameter_name": "tokens.weight"}},
                    {"user_input": {"arg": tensor("ids")}},
                    {"user_input": {"arg": tensor("mask")}},
                ],
                "output_specs": [{"user_output": {"arg": tensor("z")}}],
            },
            "module_call_graph": [{"signature": {"out_spec": '[1, {"type": null, "context": null}]'}}],
        },
    }  # fmt: skip
    for path, value in changes.items():
        place = program
        *folders, last = path.split("__")
        for folder in folders:
            place = place[folder]
        place[last] = value
    return json.dumps(program)


def exported_seeds():
    def write_text(name, text):
        write("exported", name, text.encode())

    graph = "graph_module__graph__"
    signature = "graph_module__signature__"
    calls = "graph_module__module_call_graph"
    leaf = '{"type": null, "context": null}'
    z = {"as_tensor": {"name": "z"}}

    def overlapping(name, *outputs):
        stack = f"L__self__,,Model;L__self__{name},{name},Layer"
        return {"target": "x", "inputs": [], "outputs": outputs, "metadata": {"nn_module_stack": stack}}

    call = {"target": "torch.ops.higher_order.cond", "inputs": [], "outputs": []}
    write_text("program", exported())
    write_text("schema", exported(schema_version={"major": 9, "minor": 0}))
    write_text("no_nodes", exported(nodes=[]))
    write_text("higher_order", exported(nodes=[call]))
    write_text("nested", exported(nodes=[{**call, "target": "x", "inputs": [{"name": "a", "arg": {
        "as_optional_tensor": {"as_optional_tensor": {"as_none": True}}}}]}]))  # fmt: skip
    write_text("softmax", exported(nodes=[{**call, "target": "torch.ops.aten._softmax.default"}]))
    write_text("fixed", exported(**{graph + "tensor_values": {"ids": {"dtype": 5, "sizes": [{"as_int": 2}, {"as_int": 7}]}}}))
    write_text("guard", exported(guards_code=["L['ids'].stride()[0] == 1"]))
    write_text("range", exported(range_constraints={"s0": {"min_val": 2, "max_val": 8}}))
    write_text("no_inputs", exported(**{signature + "input_specs": []}))
    write_text("twice", exported(**{signature + "input_specs": [{"user_input": {"arg": {"as_tensor": {"name": "ids"}}}}] * 2}))
    write_text("mutation", exported(**{signature + "output_specs": [{"buffer_mutation": {"buffer_name": "b"}}]}))
    write_text("stack", exported().replace("layers.0,Layer", "..,Layer"))
    meta = {
        "dtype": 7,
        "sizes": [{"as_int": 3}, {"as_int": 4}],
        "strides": [{"as_int": 4}, {"as_int": 1}],
        "storage_offset": {"as_int": 0},
        "layout": 7,
    }

    def weights(pickled=False, **changes):
        entry = {"path_name": "weight_0", "is_param": True, "use_pickle": pickled, "tensor_meta": {**meta, **changes}}
        return json.dumps({"config": {"tokens.weight": entry}})

    write_text("weights", weights())
    write_text("weights_pickled", weights(pickled=True))
    write_text("weights_huge", weights(sizes=[{"as_int": 2**62}, {"as_int": 2**62}]))
    write_text("weights_far", weights(storage_offset={"as_int": 2**63 - 1}))
    write_text("weights_negative", weights(strides=[{"as_int": -4}, {"as_int": 1}]))
    write_text("weights_sparse", weights(layout=1))
    write_text("guard_text", "((L['a'].size()[0]*L['b'].size()[1]) % L['a'].size()[0]) == 0 or not -3**2 // 2 < max(1, 2)")
    write_text("guard_deep", "(" * 4000)
    write_text("guard_negate", "-(-9223372036854775807 - 1) == 1")
    write_text("guard_modulo", "9223372036854775807 % -2 == 1")
    write_text("guard_divide", "(-9223372036854775807 - 1) // -1 == 1 or 1 % 0 == 2 or (-2)**63 < 0 or 2**-1 == 0")
    write_text("sums", exported(guards_code=[f"{' + '.join(map(str, range(60)))} == 1770"] * 8))
    write_text("of_two", exported(guards_code=["L['mask'].size()[1] <= L['ids'].size()[1]"]))
    write_text("type", exported().replace('"dtype": 5', '"dtype": 12'))
    write_text("none", exported(**{
        signature + "output_specs": [{"user_output": {"arg": {"as_none": True}}}, {"user_output": {"arg": z}}],
        calls: [{"signature": {"out_spec": f'[1, {{"type": "builtins.tuple", "children_spec": [{leaf}, {leaf}]}}]'}}],
    }))  # fmt: skip
    write_text("overlap", exported(nodes=[overlapping("a", z), *(overlapping(name) for name in "bacbca")]))


exported_seeds()
json_seeds()
profile_seeds()
snapshot_seeds()
token_file_seeds()
