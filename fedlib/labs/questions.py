"""What the labs ask, in their order. A digest is `answers.digest_of(question, answers.forms_of(kind, answer)[0])`."""

from __future__ import annotations

from fedlib.labs import properties
from fedlib.labs.answers import Value
from fedlib.labs.properties import Property

QUESTIONS: dict[str, Value | Property] = {
    "count-the-bytes/four-bytes": Value(
        "bytes",
        "628316144989d33aca9c6ebc8804dd7d",
        "Four bytes, the lowest first: look at the format strings of struct.pack.",
    ),
    "count-the-bytes/weights": Value(
        "int",
        "df701d28574e4b077f344f08ec53cdab",
        "One weight for each pair of input and output of a layer; there are no biases.",
    ),
    "count-the-bytes/payload": Value(
        "int",
        "1d5b1e2591dfb6c34ae48b08ba886ee5",
        "A float32 takes four bytes.",
    ),
    "count-the-bytes/envelope": Value(
        "int",
        "33aedd53a29937008b6d4febed644349",
        "The length of the whole message, without the bytes of its weights.",
    ),
    "count-the-bytes/all-rounds": Value(
        "int",
        "58a69c6bee5981921266e304746956c6",
        "Both directions, every client of the cohort, every round; the two messages differ in length.",
    ),
    "count-the-bytes/factor": Value(
        "float",
        "23412c87f37166ab597e2202999e2550",
        "Length of FedAvg's upload over that of packed bits and the same envelope; the last byte is filled up.",
    ),
    "quantize-and-pack/quantizer": Property(properties.quantizer, functions=2),
    "quantize-and-pack/gain": Value(
        "int",
        "e9e24cfd03a1d764bf80437dda26d13d",
        "The mean squared error goes with the square of the step, the step with one over the intervals, 2^b - 1.",
    ),
    "quantize-and-pack/size": Value(
        "int",
        "641ca741111fb3b31f529573c08d4de4",
        "Three bits each, eight bits to a byte, and the last byte is filled up.",
    ),
    "quantize-and-pack/packing": Property(properties.packing, functions=2),
    "learn-a-mask/mask": Property(properties.masked),
    "learn-a-mask/straight-through": Property(properties.straight_through),
    "learn-a-mask/mask-bytes": Value(
        "int",
        "618e2d6bff4d0e78e1f874132648e9c9",
        "One bit for each weight, eight bits to a byte.",
    ),
    "learn-a-mask/votes": Value(
        "array",
        "1d45d088c17adbf0a1831a349efeb28e",
        "For each weight, how many of the three clients keep it.",
    ),
    "make-it-sparse/entropy": Property(properties.entropy),
    "make-it-sparse/bound": Value(
        "int",
        "8b6be9d45173837db0b9549269ddcd01",
        "n H(k/n) bits, eight to a byte, rounded up to a whole byte.",
    ),
    "make-it-sparse/positions": Value(
        "int",
        "d683e29cbc50c5fa2b06edc85b355f0e",
        "How many bits tell 4,736 positions apart? So many for each one, eight to a byte, rounded up.",
    ),
    "make-it-sparse/pull": Value(
        "float",
        "e74969ac1a0833dcd336ba8501dd805a",
        "The chain rule: derivative of the mean by one of its entries, times that of the sigmoid at 0.",
    ),
    "update-inside-noise/chance": Property(properties.chance),
    "update-inside-noise/mask": Property(properties.found_in_noise),
    "update-inside-noise/share": Value(
        "float",
        "c36a31f91729c4bed4004dff1049f3aa",
        "The ratio u / noise must be above 0: how often has the noise the sign of u?",
        digits=2,
    ),
    "update-inside-noise/message": Property(properties.message, functions=2),
    "update-inside-noise/length": Value(
        "int",
        "b81650b6d7dedcbcb3cbce7a4fbc9e68",
        "The seed's bytes, and the packed mask's.",
    ),
    "freeze-and-privacy/trained": Value(
        "int",
        "a855dc6e6001a17e37829e4ee6ece3f4",
        "Only the layer from 64 hidden units to 10 classes is left.",
    ),
    "freeze-and-privacy/clip": Property(properties.clipping),
    "freeze-and-privacy/noisy-mean": Property(properties.noisy_mean),
    "freeze-and-privacy/noise-norm": Value(
        "float",
        "b41f2f742aecb380b0d2ab091b3681bc",
        "The length of d independent draws grows with the square root of d.",
    ),
    "freeze-and-privacy/tenths": Value(
        "int",
        "b99c871aeaa98ca77808f7222025abed",
        "Try 1, 2, 3 ... tenths as the noise multiplier until epsilon is at most 2; more noise, smaller epsilon.",
    ),
    "design-a-codec/front": Property(properties.front),
    "design-a-codec/codec": Property(properties.codec, functions=2),
}
