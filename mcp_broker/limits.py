"""Every bound of the system, with its unit and its reason.

Names end in their unit: ``_BYTES``, ``_S`` (seconds), ``_MS``, or ``_MAX`` for a count.
"""

from __future__ import annotations

from typing import Final

# -- the wire ---------------------------------------------------------------------------------

#: A message's first frame: four times a batch of 256 small calls, to leave room for payloads. Above it, refused undecoded.
ENVELOPE_BYTES_MAX: Final = 256 * 1024
#: A payload up to this size rides in the envelope, a larger one in the second frame: below it pyzmq copies cheaper.
INLINE_BYTES_MAX: Final = 64 * 1024
#: The second frame: one payload of 1 MiB and its msgpack head. What is larger goes in parts or chunks, so that no message
#: holds up the loop, or a small call behind it, for longer than it takes to copy a MiB.
BODY_BYTES_MAX: Final = 1024 * 1024 + 4096
#: What libzmq lets a peer announce before it has proved anything (ZMQ_MAXMSGSIZE): the body and CURVE's box around it.
FRAME_BYTES_MAX: Final = BODY_BYTES_MAX + 1024
#: Payloads below it travel as they are: a smaller message would not be sent any sooner.
COMPRESS_BYTES_MIN: Final = 4096
#: A larger payload is compressed only if this much of its beginning gets smaller: 10 us tell that a MiB will not.
COMPRESS_SAMPLE_BYTES: Final = 64 * 1024
#: Compressed size over size from which on the receiver's work is not worth it.
COMPRESS_WORTH: Final = 0.9
#: zstd's own default: above 300 MB/s, and higher levels gain a few percent for several times the time.
COMPRESS_LEVEL: Final = 3
#: Calls or outcomes in one message: bounds a loop turn's work for one peer.
BATCH_MAX: Final = 256
#: Sum of the inline payloads that a sender puts into one envelope, so that it stays under its bound.
BATCH_BYTES_MAX: Final = 128 * 1024
#: A JWT with a generous scope list is under 2 KiB.
TOKEN_BYTES_MAX: Final = 8 * 1024
TOOL_NAME_CHARS_MAX: Final = 128
TEXT_CHARS_MAX: Final = 4096
DETAILS_BYTES_MAX: Final = 32 * 1024
#: Tools in one REGISTER, and their schema's size each.
TOOLS_PER_WORKER_MAX: Final = 256
SCHEMA_BYTES_MAX: Final = 32 * 1024
#: Levels of a schema: whoever lists tools has less stack left than whoever registered them, and no signature needs so many.
SCHEMA_DEPTH_MAX: Final = 64
CAPABILITIES_MAX: Final = 32
#: REGISTER is the one message that may exceed the envelope's bound: 256 tools with schemas. All tools of a pool together have
#: no more bytes than it, however often its workers register: they are told in one message too.
REGISTER_BYTES_MAX: Final = BODY_BYTES_MAX

# -- time ------------------------------------------------------------------------------------

CALL_TIMEOUT_S: Final = 30.0
#: A day: longer work is a job, not a call.
CALL_TIMEOUT_S_MAX: Final = 86_400.0
#: The broker speaks to each session with calls in flight this often; a send that fails ends the session.
HEARTBEAT_S: Final = 0.25
#: A client that heard nothing for this long while calls are in flight opens a new connection.
SILENCE_S: Final = 1.0
#: A lost session waits so long for its client to resume: with a heartbeat to notice, its calls are cancelled within a second.
RESUME_GRACE_S: Final = 0.5
#: Outcomes of a dying worker may still be in its socket's buffer when its death is reported.
DEATH_SETTLE_S: Final = 0.02
#: After the cooperative cancel (at once): SIGTERM, then SIGKILL. The outcome has been sent by then; the kill goes on behind it.
CANCEL_TERM_S: Final = 0.1
CANCEL_KILL_S: Final = 0.25
#: A worker that lets go of no ended call is killed then, whatever it says it runs: longer than hooks may run in between
#: (HOOK_S), and than a worker takes to notice that its connection is dead.
KILL_UNHEEDED_S: Final = 6.0
#: CURVE handshake: a silent connection is closed after it.
HANDSHAKE_MS: Final = 1000
DRAIN_S: Final = 10.0
#: A broker that has drained waits so long for clients to say that they read their last outcomes.
PART_S: Final = 0.5
CONNECT_S: Final = 5.0
#: A worker that retires waits so long after its last outcome for clients to say that they have it: four heartbeats.
ARRIVE_S: Final = 1.0
#: A worker that retires may finish its calls for so long: most time out after CALL_TIMEOUT_S, and some are worth waiting for.
RETIRE_S: Final = 300.0
#: From SIGTERM to SIGKILL: a worker that is to finish something is drained before it is stopped.
STOP_S: Final = 1.0
#: A wait for a worker that makes a pool grow: a person notices it, and a worker is up about as soon.
GROW_WAIT_S: Final = 0.25
#: How long a pool has more workers than it needs: bursts that come back within it find them.
SHRINK_AFTER_S: Final = 30.0
#: A supervisor that says nothing of a command for so long is stuck: it says every second how far it is.
COMMAND_SILENCE_S: Final = 5.0
#: Between two words of the supervisor about a command that takes its time.
COMMAND_WORD_S: Final = 1.0

# -- flow -----------------------------------------------------------------------------------------

#: Unfinished calls a client session may have at the broker; WELCOME tells the client.
CLIENT_WINDOW_MAX: Final = 1024
#: Calls that wait for one pool, and the bytes of their arguments: a pool whose workers are away leaves room for others.
QUEUE_CALLS_MAX: Final = 65_536
QUEUE_BYTES_MAX: Final = 128 * 1024 * 1024
#: The same for one principal, over all its sessions and all pools: a quarter of a pool, so that no flood fills one.
PRINCIPAL_QUEUE_CALLS_MAX: Final = 16_384
PRINCIPAL_QUEUE_BYTES_MAX: Final = 64 * 1024 * 1024
#: The same for the whole broker. A waiting call takes about 1 KiB beside its arguments.
BROKER_QUEUE_CALLS_MAX: Final = 131_072
BROKER_QUEUE_BYTES_MAX: Final = 256 * 1024 * 1024
#: What OVERLOADED says of the time to try again: as estimated, within these; this one where nothing was measured.
RETRY_AFTER_S: Final = 1.0
RETRY_AFTER_S_MIN: Final = 0.05
RETRY_AFTER_S_MAX: Final = 30.0
#: A broker that measured a pool's drain longer ago than this measures anew.
DRAIN_SPAN_S_MAX: Final = 5.0
#: A waiting call counts as one of the next higher class after this long: twice it is well within the default timeout.
PRIORITY_AGE_S: Final = 5.0
#: A principal's share of a busy pool, against that of one with weight 1.
WEIGHT_MAX: Final = 100
#: Bytes of arguments for which a call takes one more part of its principal's turn: about what travels inline.
COST_BYTES: Final = 64 * 1024
#: Calls of one tool that its pool's workers may hold at a time, where the tool says so.
CONCURRENCY_MAX: Final = 65_536
#: Calls a second that a rate limit may allow; more is no limit.
RATE_MAX: Final = 1_000_000
#: The slowest rate, once in the time that the longest call may take; a lower one counts as it, or the wait could not be told.
RATE_MIN: Final = 1 / CALL_TIMEOUT_S_MAX
#: Principals whose rate is remembered; above it the full buckets go first, which are as good as new ones.
BUCKETS_MAX: Final = 8192
#: Calls that a worker may hold, running one included.
WORKER_DEPTH_MAX: Final = 256
#: What a worker's queue should hold: enough work to hide the round trip to the broker.
WORKER_QUEUE_TARGET_S: Final = 0.002
#: Parts of a stream that a worker may send before its caller takes one.
STREAM_WINDOW_MAX: Final = 16
#: Parts ahead of the last one that a caller may allow; more would only move its backlog into the worker.
STREAM_AHEAD_MAX: Final = 64
#: Payloads of parts that a session keeps until its client's credit covers them, all its streams together: a whole
#: window of parts of 1 MiB. Past it a stream cannot survive a lost connection.
STREAM_KEPT_BYTES_MAX: Final = 16 * 1024 * 1024
#: A chunk of an argument: large enough that a message costs little against its bytes, and other calls' get in between.
CHUNK_BYTES_MAX: Final = 256 * 1024
#: Chunks that a client may send before its worker has read one; both ends hold at most so many. 1 MiB on its way hides
#: the round trip; 4 MiB carried a sixth more, and an echo beside it took twice as long.
UPLOAD_WINDOW_MAX: Final = 4
#: Bytes of parts that a client lets come before it takes them, for the same reason.
STREAM_AHEAD_BYTES: Final = UPLOAD_WINDOW_MAX * CHUNK_BYTES_MAX
#: A tool's reports of progress of one call go out this far apart: a person sees no more, and no loop floods anybody.
PROGRESS_S: Final = 0.05
#: "Did you mean" compares a name with all others, about 1 ms: so many in so much time, for all clients.
HINTS_MAX: Final = 8
HINTS_S: Final = 0.1
#: Arguments of the broker's own tools, which it reads itself.
OWN_ARGUMENTS_BYTES_MAX: Final = 4096
#: Answers of them that one turn gives, to all clients; a large one, 1 to 2 ms for 200 tools, counts as half of them.
OWN_ANSWERS_MAX: Final = 8
#: Commands of operators that are under way at once: each waits for processes to come and go.
COMMANDS_MAX: Final = 64
#: Executions of an idempotent call, the first included.
ATTEMPTS_MAX: Final = 3
#: Distinct workers that a call may kill before it is POISONED.
POISON_DEATHS: Final = 2
#: Client sessions and workers that a broker admits; half of the sessions may be one principal's.
SESSIONS_MAX: Final = 4096
PRINCIPAL_SESSIONS_MAX: Final = SESSIONS_MAX // 2
WORKERS_MAX: Final = 1024
#: Calls from earlier connections that a worker tells of when it registers: all that it can hold, and the outcomes
#: that a client may leave unacknowledged for a while. Older outcomes are let go.
HELD_MAX: Final = 4096
HELD_BYTES_MAX: Final = 32 * 1024 * 1024
#: How long a broker keeps what workers tell of and no client asks for: clients reconnect within a second or two.
ORPHAN_S: Final = 10.0
#: Calls that the dead had started, as they are remembered: of WORKERS_MAX that die at once the last 64 each; of fewer, more.
STARTED_MAX: Final = 64 * WORKERS_MAX
#: Messages that a turn takes from one socket, so that timers are never starved; each may carry BATCH_MAX calls.
TURN_MESSAGES_MAX: Final = 64
#: Messages that wait in our own queue for a peer whose socket is full; past it, the session ends.
PEER_BACKLOG_MAX: Final = 4096
#: Less would cut off a client with twenty streams of 256 KiB parts, STREAM_WINDOW_MAX of each, when its network stands still.
PEER_BACKLOG_BYTES_MAX: Final = 64 * 1024 * 1024
#: Bytes of results, unacknowledged or expected, before a client's calls of tools with large results wait: 16 of the largest.
CLIENT_BEHIND_BYTES: Final = 16 * 1024 * 1024
#: The same before results are dropped. A worker may hold WORKER_DEPTH_MAX calls of a tool whose results were small yet.
CLIENT_UNREAD_BYTES_MAX: Final = 256 * 1024 * 1024
#: Of all clients, parts of streams included, at a heartbeat; past it, who holds most is cut off, of the principal with most.
UNREAD_BYTES_MAX: Final = 1024 * 1024 * 1024
#: libzmq's own queues are a fuse, several times our windows.
SOCKET_HWM: Final = 4096
#: Except for a client: what that has acknowledged, read or not, is counted nowhere else, and 64 of the largest messages are
#: 64 MiB. A turn sends a client a message or two, which libzmq passes on: nobody who reads meets it.
CLIENT_SEND_HWM: Final = 64
LISTEN_BACKLOG: Final = 1024

# -- what a worker may use ----------------------------------------------------------------------

#: The usual limits fit a tool that works on text or on a table; the most is what a configuration or a tool may ask for:
#: twenty workers fill 10 GB at the worst. Memory is growth above what the worker held when it was ready.
MEMORY_MB: Final = 100
MEMORY_MB_MAX: Final = 500
#: Of one call, with the processes that it starts.
CPU_S: Final = 30.0
CPU_S_MAX: Final = 120.0
#: Descriptors, and sockets among them, above what the worker held when it was ready; of each process.
OPEN_FILES: Final = 50
OPEN_FILES_MAX: Final = 200
#: Descriptors that the worker's own code needs for an instant; the kernel allows so many more.
OWN_FILES: Final = 8
CONNECTIONS: Final = 10
CONNECTIONS_MAX: Final = 50
#: Processes below a worker: a pipeline of programs, or a pool of a process a core, with room to spare.
PROCESSES: Final = 32
PROCESSES_MAX: Final = 256
#: Tasks (processes and their threads) where the kernel counts them: what PROCESSES would have with libraries that
#: start a thread a core. A fork bomb ends here, long before the machine's own bound.
TASKS_A_PROCESS: Final = 16
#: The private folder: five times the usual memory, room to spill what does not fit there. Twenty workers fill 10 GB at the worst.
SCRATCH_MB: Final = 512
SCRATCH_MB_MAX: Final = 65_536
#: Shares of a limit at which a worker is warned of, gets no new calls, and is killed.
WARNING_SHARE: Final = 0.8
THROTTLE_SHARE: Final = 0.95
#: A level is left this share below where it was entered, so that what sways about it does not flap.
RELIEF_SHARE: Final = 0.05
#: A worker that runs something is looked at this often, one that rests so often: 1 GB/s passes a limit by some 50 MB.
METER_S: Final = 0.05
METER_RESTING_S: Final = 1.0
#: With no worker at work, the supervisor looks this often whether one is.
METER_IDLE_S: Final = 0.1
#: Descriptors cost ten times what memory and CPU do: about 5 us each.
METER_FILES_S: Final = 0.2
#: Share of one core that measuring may take, however many workers there are: beyond it they are looked at more rarely.
METER_SHARE_MAX: Final = 0.05
#: Time from asking a worker for its stacks to killing it: writing them takes a millisecond. On a machine that is busy it
#: may take longer, and gets up to the other one.
STACK_S: Final = 0.02
STACK_S_MAX: Final = 0.1
#: Descriptors that a supervisor lets itself have, where it may: ten for each of some thousand workers.
DESCRIPTORS_MAX: Final = 65_536
#: Entries of a scratch folder that one look counts (about 2 ms), the depth that it follows, and how much each entry
#: takes at least: a million empty files are no small thing either.
SCRATCH_ENTRIES_A_LOOK: Final = 1024
SCRATCH_DEPTH_MAX: Final = 64
SCRATCH_ENTRY_KIB: Final = 4
#: Bytes of lists of mappings that one look reads (about 2 ms): of a large library 100,000, of a hostile worker millions.
MAPPINGS_BYTES_A_LOOK: Final = 262_144
#: The kernel's own bound of memory lies this share above the limit, and so much at least (what is taken between two looks
#: at a gigabyte a second): a worker is usually seen, and its stacks written, before the kernel kills it, or one of its
#: processes, without a word.
MEMORY_SLACK_SHARE: Final = 0.5
MEMORY_SLACK_MB_MIN: Final = 64
#: A throttled worker that has rested so long has not let go of what it holds, and is replaced.
THROTTLED_REST_S: Final = 2.0
#: A worker that says that it rests, and uses so many cores all the while since the last look, does not.
RESTING_CORES_MAX: Final = 0.5
#: Where a successor could not start, workers are replaced for age or use so long after the last try at the soonest.
RECYCLE_RETRY_S: Final = 60.0
#: Share by which a worker may be recycled before its configured calls, memory or age.
RECYCLE_JITTER: Final = 0.2
#: Adaptive limits look back and ahead so far, add so much, change so often; use is kept in such steps.
ADAPT_WINDOW_S: Final = 3600.0
ADAPT_AHEAD_S: Final = 300.0
ADAPT_HEADROOM_SHARE: Final = 0.2
ADAPT_EVERY_S: Final = 300.0
ADAPT_STEP_S: Final = 10.0

# -- records ----------------------------------------------------------------------------------------

#: Death certificates and ended calls kept for `why`.
DEATHS_MAX: Final = 256
ENDED_CALLS_MAX: Final = 4096
STDERR_TAIL_BYTES: Final = 4096
#: The end of a stuck worker's stacks, about 100 frames: with the tail of its standard error it fits into an error.
STACK_BYTES_MAX: Final = 8192

# -- reclaim ------------------------------------------------------------------------------------------

#: What one turn of the supervisor's loop spends on taking back what the dead left: a death is told within it.
RECLAIM_SLICE_S: Final = 0.004
#: What one system call may free of a file or of shared memory: the kernel takes about 0.1 ms a MiB where it must.
FREE_BYTES_MAX: Final = 64 * 1024 * 1024
#: Names of what could not be taken back, in one step's record; the rest are as their count says.
RECLAIM_LEFT_MAX: Final = 8
#: Reclaim records kept: as many as death certificates.
RECLAIMS_MAX: Final = DEATHS_MAX
#: What an orderly stop waits for reclaim to finish; what is left then, the next start removes.
RECLAIM_STOP_S: Final = 5.0

# -- leased ports ---------------------------------------------------------------------------------------

#: The range by default: below that from which Linux takes ports for outgoing connections (32768), registered for nobody.
PORT_MIN: Final = 18_000
PORT_MAX: Final = 18_099
#: Leases of one worker at a time: a tool needs one or two.
PORTS_PER_WORKER: Final = 8
#: Connections of a port whose lease is over may take this long to end.
PORT_DRAIN_S: Final = 10.0
#: A port that somebody else had is tried again after this time.
PORT_RETRY_S: Final = 60.0
#: Connections that wait to be accepted at a leased port.
PORT_BACKLOG: Final = 128
#: Networks in one allow-list: each is looked at for each packet.
NETWORKS_MAX: Final = 32
#: The supervisor answers within a turn; a worker that waits longer for a port does so for nothing.
PORT_WAIT_S: Final = 5.0

#: About what a kept record takes besides its payloads.
RECORD_BYTES: Final = 512
#: Outcomes of calls with an idempotency key: long enough for any caller's retries. Past a bound of this and the next two, whoever
#: has the most loses its oldest.
IDEMPOTENCY_TTL_S: Final = 600.0
IDEMPOTENCY_KEY_CHARS_MAX: Final = 256
IDEMPOTENCY_KEYS_MAX: Final = 65_536
IDEMPOTENCY_BYTES_MAX: Final = 64 * 1024 * 1024
#: Outcomes of detached calls that wait to be fetched.
DETACHED_TTL_S: Final = 3600.0
DETACHED_MAX: Final = 4096
DETACHED_BYTES_MAX: Final = 64 * 1024 * 1024
#: Poisoned calls: a day, for somebody to look at them.
DEAD_LETTER_TTL_S: Final = 86_400.0
DEAD_LETTERS_MAX: Final = 1024
DEAD_LETTERS_BYTES_MAX: Final = 32 * 1024 * 1024

# -- recovery ---------------------------------------------------------------------------------------

#: How far back a breaker looks: long enough for 20 calls of a tool that is called every second.
BREAKER_WINDOW_S: Final = 30.0
#: Calls below which a share of failures says nothing, and the share that opens a breaker.
BREAKER_CALLS_MIN: Final = 20
BREAKER_SHARE: Final = 0.5
#: How long a breaker stays open before one call may try: the first time, and at most, doubling between.
BREAKER_OPEN_S: Final = 5.0
BREAKER_OPEN_S_MAX: Final = 60.0
#: Principals that a breaker tells apart; further ones count as one.
BREAKER_PRINCIPALS_MAX: Final = 256
#: What a breaker's callers are told while its one trial is under way.
BREAKER_TRIAL_S: Final = 1.0
#: What is remembered of a tool: its latest failures, steps of recovery, and changes of state.
FAILURES_KEPT: Final = 10
STEPS_KEPT: Final = 10
LIFECYCLE_KEPT: Final = 100
#: Failures of a tool after which it gets a worker of its own: in a row, or within a time.
ISOLATE_IN_A_ROW: Final = 3
ISOLATE_FAILURES: Final = 5
ISOLATE_WINDOW_S: Final = 3600.0
#: Principals that must have seen it fail before it is taken out for their number.
UNREGISTER_PRINCIPALS: Final = 2
#: How long without a failure takes a tool one step down the ladder of recovery.
LADDER_QUIET_S: Final = 600.0
#: How long a tool's calls wait after its second failure in a row, and at most, doubling: a usual timeout survives it.
PENALTY_S: Final = 0.25
PENALTY_S_MAX: Final = 5.0
#: How long a worker's hooks may take from when nothing else runs there: a caller's usual timeout survives it.
HOOK_S: Final = 5.0
#: How long other processes may take to replace those of a tool that is recovered; its calls wait meanwhile.
RECOVER_S: Final = 15.0
#: Tools that a broker serves, its own excepted.
TOOLS_MAX: Final = 1000

# -- credentials ------------------------------------------------------------------------------------

TOKEN_TTL_S: Final = 30 * 86_400
TOKEN_TTL_S_MAX: Final = 90 * 86_400
#: Clocks of issuer and verifier may differ by this much.
TOKEN_LEEWAY_S: Final = 5

# -- the node link ----------------------------------------------------------------------------------

#: Of each kind of refusal the first is logged, and after so long how many more: anybody with the public key can have them.
REFUSALS_TOLD_S: Final = 60.0
#: Kinds of failures in the supervisor that are told apart: there are only so many places in it.
FAILURE_KINDS_MAX: Final = 64
#: One log line of a broker or worker, with its newline: what a pipe takes whole, so that lines of two writers never mix.
LOG_LINE_BYTES_MAX: Final = 4096
#: Lines of a child's stream that are logged, a second and at once: each costs the supervisor, which serves all, some 30 us.
OUTPUT_LINES_PER_S: Final = 100.0
OUTPUT_LINES_BURST: Final = 500
#: Both ends are ours; the largest message is a report of WORKERS_MAX workers or DEATHS_MAX certificates.
NODE_BYTES_MAX: Final = 16 * 1024 * 1024
#: A broker answers the report of each second. One that says nothing for so long hangs: no turn of its loop takes that long.
BROKER_SILENCE_S: Final = 10.0
#: One packet of a worker's tether: a kind and a few short fields.
TETHER_BYTES_MAX: Final = 4096
#: What a worker may say on its tether, a second and at once: it says little, and the supervisor has one thread for all.
TETHER_MESSAGES_PER_S: Final = 100.0
TETHER_MESSAGES_BURST: Final = 200
#: One packet to a zygote: a worker's whole environment is in it. Half of what a socket takes by default.
ZYGOTE_BYTES_MAX: Final = 100 * 1024
#: A zygote imports for a third of a second on an idle machine; workers wait for it as long as that pays.
ZYGOTE_START_S: Final = 5.0
#: A zygote forks in a few milliseconds. One that has forked nothing for so long, with orders before it, hangs.
ZYGOTE_ANSWER_S: Final = 2.0
#: One for each interpreter and environment that a configuration names, and each keeps some 30 MiB.
ZYGOTES_MAX: Final = 8
#: Room for a worker's id where others see it: a pool's name of 64 characters, and a number.
WORKER_ID_CHARS_MAX: Final = 96
#: Heartbeats (each HEARTBEAT_S) between two to a client without, and to a worker without, calls.
IDLE_BEATS: Final = 20
WORKER_IDLE_BEATS: Final = 4

# -- confinement --------------------------------------------------------------------------------------

#: Uids, and gids of the same numbers, for one worker's life each, where the supervisor is root: (first, how many).
#: The first range that is mapped here is used. Far above what systems give to people (60,000), subordinate ids
#: (from 100,000) and containers of systemd (below 1,879,048,192); the second one is for containers with 65,536 ids.
UID_RANGES: Final = ((1_879_100_000, 16_384), (60_600, 3000))
#: A key, a profile, what a pool's `secrets` name: a wrong path (a log, a device) does not fill the memory.
SECRET_BYTES_MAX: Final = 64 * 1024
#: A worker is a better victim than its supervisor and broker when memory ends.
WORKER_OOM_SCORE: Final = 500
