"""Every bound of the wire, each with its reason.

A peer that goes beyond one of them has made a protocol error: nothing is truncated, nothing is
guessed.
"""

from __future__ import annotations

__all__ = [
    "ACK_EVERY_BYTES",
    "ACK_EVERY_FRAMES",
    "ACK_SECONDS",
    "ALIGNMENT",
    "BATCH_BYTES",
    "CHUNK_BYTES",
    "DIAL_BACK_SECONDS",
    "HANDSHAKE_SECONDS",
    "HEARTBEAT_SECONDS",
    "INLINE_BYTES",
    "MAX_CALLS",
    "MAX_CALLS_OF_NODE",
    "MAX_CAPABILITIES",
    "MAX_CONSTANT_BYTES",
    "MAX_DEPTH",
    "MAX_DIMENSIONS",
    "MAX_FRAME_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_HUB_BYTES",
    "MAX_ID",
    "MAX_IDS",
    "MAX_NAME",
    "MAX_NODES",
    "MAX_OPEN_STREAMS",
    "MAX_PLANS",
    "MAX_PLAN_BYTES",
    "MAX_PLAN_SLOTS",
    "MAX_TAGS",
    "MAX_TENSOR_BYTES",
    "MAX_TEXT",
    "MAX_WATCHERS",
    "PROBE_SECONDS",
    "REPLY_BACKLOG_BYTES",
    "SESSION_TTL_SECONDS",
    "SILENCE_SECONDS",
    "WINDOW_BYTES",
    "WINDOW_FRAMES",
]

#: Tensor bytes start at multiples of this: complex128 is the widest element, and a JavaScript
#: typed array refuses an offset that is no multiple of its element size.
ALIGNMENT = 16

#: A large tensor travels in pieces of this size. Measured: 256 KiB frames move 2.1–2.4 GB/s over
#: loopback, one frame of 64 MiB 0.3–0.5 GB/s (masking stays in the cache), 64 KiB 1.3 GB/s.
CHUNK_BYTES = 256 * 1024

#: Tensors up to this size (all of a frame together) travel inside a batch: more would hold up the
#: heartbeat behind it, and a chunk is that size anyway.
INLINE_BYTES = CHUNK_BYTES

#: msgpack amplifies: an array of empty arrays takes 68 times its size in memory once unpacked,
#: so 256 KiB of header costs a peer's victim 17 MiB at most.
MAX_HEADER_BYTES = 256 * 1024

#: A sender closes a batch at this size: large enough that the cost per frame vanishes (about
#: 2,000 commands), small enough that the other side starts to work early.
BATCH_BYTES = 64 * 1024

#: Length word, header, padding and tensors together. Also the WebSocket's ``max_size``.
MAX_FRAME_BYTES = 4 + MAX_HEADER_BYTES + ALIGNMENT + INLINE_BYTES + 4096

#: Nesting of an argument. torch's own calls nest three deep.
MAX_DEPTH = 32

#: torch itself stops at 64 dimensions.
MAX_DIMENSIONS = 64

#: Identifiers are integers that JavaScript can hold exactly.
MAX_ID = 2**53 - 1

#: Identifiers in one message: results of an operation, deletes of a batch.
MAX_IDS = 16_384

#: A name, a reason, a tag, an error's text.
MAX_TEXT = 4096

#: Tags of one object.
MAX_TAGS = 32

#: One tensor; above it even the announcement is refused. 1 TiB is beyond any worker's memory.
MAX_TENSOR_BYTES = 2**40

#: Streams announced and not complete. A sender sends one after the other; a few more let a
#: relay interleave.
MAX_OPEN_STREAMS = 16

#: A recorded program. An operation takes about 30 bytes, a parameter with Adam ten operations: this
#: is enough for 3,000 parameters, and unpacked it takes 68 MiB at most.
MAX_PLAN_BYTES = 1024 * 1024

#: What the steps of a program make; a slot costs eight bytes at each run.
MAX_PLAN_SLOTS = 131_072

#: Programs that a session keeps at a time.
MAX_PLANS = 1024

#: Sent and not yet processed by the peer: bytes. Above the bandwidth-delay product of 1 Gbit/s
#: at 100 ms (12.5 MB).
WINDOW_BYTES = 16 * 1024 * 1024

#: Sent and not yet processed by the peer: frames. Bounds the list a receiver keeps for frames
#: of a few bytes.
WINDOW_FRAMES = 1024

#: A receiver says how far it is after this many frames or bytes, if nothing else left earlier.
ACK_EVERY_FRAMES = 32
ACK_EVERY_BYTES = WINDOW_BYTES // 8

#: Seconds after which it does so where there was less: a frame of its own for each frame would
#: double the work of both sides.
ACK_SECONDS = 0.05

#: A worker starts no further command while replies of this size wait for the client.
REPLY_BACKLOG_BYTES = WINDOW_BYTES

#: A local tensor met in a remote operation travels along unasked up to this size: hidden states,
#: masks and index tensors of ordinary models are below it, data sets are above.
MAX_CONSTANT_BYTES = 64 * 1024

#: An idle side shows that it lives this often. NAT tables forget after 30 s at the earliest.
HEARTBEAT_SECONDS = 10.0

#: A peer from which nothing came for so long is lost: four heartbeats.
SILENCE_SECONDS = 40.0

#: The first message has to come within this time, so that an open port costs little; and so has
#: its answer, so that a client does not wait for a server that is no worker.
HANDSHAKE_SECONDS = 10.0

#: A session without a connection lives this long (monotonic clock).
SESSION_TTL_SECONDS = 120.0

#: A message between a hub and those that dial it, frame and all. The longest announcement that the
#: bounds below allow has 21 KiB in ASCII; unpacked, what is no announcement takes 2 MiB at most.
MAX_HUB_BYTES = 32 * 1024

#: Characters of a node's name, of a tag and of a capability, as a hub's page shows them.
MAX_NAME = 128

#: Capabilities that a node announces: kernel families of a portable worker, with room to grow.
MAX_CAPABILITIES = 128

#: Nodes that a hub keeps: about 20 KiB each while they are idle.
MAX_NODES = 10_000

#: Clients that wait at a hub for a node to dial back, all together.
MAX_CALLS = 1024

#: Clients that wait for the same one, so that a node that does not answer leaves room for others.
MAX_CALLS_OF_NODE = 64

#: Clients that are told by a hub who comes and goes.
MAX_WATCHERS = 1024

#: A node that is called dials back within this time, handshake and TLS included.
DIAL_BACK_SECONDS = 10.0

#: A node whose name another one claims shows within this time that it is there.
PROBE_SECONDS = 5.0
