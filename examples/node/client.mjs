// A client of mcp-broker in JavaScript, written from docs/protocol.md; words in quotes are sections of that document.
//   node client.mjs PROFILE TOOL [ARGUMENTS]   prints the result, or fails with what the broker says
//   node client.mjs vectors FOLDER             checks the golden vectors
import { deepStrictEqual } from "node:assert"
import { randomBytes } from "node:crypto"
import { readFileSync, statSync } from "node:fs"
import { decode, encode } from "@msgpack/msgpack"
import { Dealer } from "zeromq"
const HELLO_MS = 5000, SILENCE_MS = 1000, GRACE_MS = 500, BACKOFF_MS = 50, BACKOFF_MAX_MS = 1000
const INLINE_BYTES = 65_536, BODY_BYTES = 1_052_672, ACK_EVERY = 64, FINAL = ["UNAUTHENTICATED", "UNSUPPORTED_VERSION"]
const now = () => performance.now(), hex = (bytes) => Buffer.from(bytes).toString("hex") // now: in ms, by no wall clock

/** Why a call failed, as in "Errors". */
const failure = (code, why, retryable = false, details = {}) => Object.assign(Error(why), { code, retryable, details })

/** Read a profile. What we need of it holds no TOML escapes, so two patterns will do. */
export function readProfile(path) {
  if (statSync(path).mode & 0o077) throw new Error(`others may read ${path}: chmod 600 it`)
  const text = readFileSync(path, "utf8"), list = /^endpoints *= *\[((?:\s*"[^"]*",?)*)\s*\]/m.exec(text)
  const fields = Object.fromEntries([...text.matchAll(/^(\w+) *= *"([^"]*)"/gm)].map((found) => found.slice(1)))
  return { ...fields, endpoints: [...(list?.[1] ?? "").matchAll(/"([^"]*)"/g)].map((found) => found[1]) }
}

/** A session with a broker. It connects again by itself, until close() or until the broker refuses it for good. */
export class Client {
  #profile; #socket; #timer; #closed // the last: what every further call ends with
  #open = false; #epoch = 0; #last = 0; #session = null; #lineage = ""; #granted = {} // as the last WELCOME has them
  #count = 0; #acked = 0 // outcomes of the session that we have, and how many of them the broker was told of
  #calls = new Map(); #unsent = new Set() // calls without an outcome, by id; those not sent on this connection
  #prefix = randomBytes(8); #made = 0; #skipped = 0; #failed = 0; #heard = 0; #retryAt = 0; #sent = Promise.resolve()

  constructor(profile) {
    this.#profile = profile
    this.#connect()
    this.#timer = setInterval(() => setImmediate(() => this.#tick(now())), 25) // immediate: what has come is read first
  }

  /** Call a tool: its result (of a streaming tool: the list of its parts), or an error with code and details. */
  async call(tool, args, seconds) {
    let stream = this.stream(tool, args, seconds, false), parts = [], next
    while (!(next = await stream.next()).done) parts.push(next.value)
    return parts.length ? parts : next.value
  }

  /** Yield the parts of a streaming tool as they come, and return the result. Leaving the loop cancels the call. */
  async *stream(tool, args = {}, seconds = 30, streamed = true) {
    const packed = encode(args), id = Buffer.concat([this.#prefix, Buffer.alloc(8)])
    if (this.#closed || packed.length > BODY_BYTES) throw this.#closed ?? failure("PAYLOAD_TOO_LARGE", "arguments")
    id.writeUIntBE(++this.#made, 10, 6) // the shard before it stays 0
    const call = { id, tool, packed, deadline: now() + seconds * 1000, streamed, parts: [], next: 0, taken: 0 }
    this.#calls.set(hex(id), call)
    this.#unsent.add(call)
    this.#flush()
    try {
      for (;;) {
        while (!call.parts.length && !call.ended) await new Promise((wake) => (call.wake = wake))
        if (call.parts.length) yield call.parts.shift()
        else if (call.error) throw call.error
        else return call.result
        this.#send(["CREDIT", [[id, ++call.taken + this.#granted.stream_window]]])
      }
    } finally {
      this.#end(call, failure("CANCELLED", "the caller left the stream"))
    }
  }

  async close(why = failure("CANCELLED", "the client was closed")) {
    this.#closed = why
    clearInterval(this.#timer)
    this.#send(["GOODBYE", "done"])
    await this.#sent
    if (this.#socket) this.#socket.linger = 200 // else GOODBYE would be thrown away with the socket
    this.#lose()
    for (const call of this.#calls.values()) this.#end(call, why)
  }

  #flush() { // oldest first, as far as the window goes
    for (const call of this.#open ? this.#unsent : []) {
      const inFlight = this.#calls.size - this.#unsent.size, left = Math.max(1, Math.ceil(call.deadline - now()))
      if (inFlight >= this.#granted.window) return
      if (!inFlight) this.#heard = now() // until now the broker had no reason to speak
      const [inline, ...body] = call.packed.length > INLINE_BYTES ? [null, call.packed] : [call.packed]
      const item = [call.id, call.tool, left, inline, call.sent ? { again: true } : null]
      this.#send(["CALLS", (this.#acked = this.#count), [item]], ...body)
      call.sent = this.#unsent.delete(call) // true
    }
  }

  #send([kind, ...fields], ...body) {
    if (!this.#open && kind !== "HELLO") return // WELCOME brings again what counts
    const socket = this.#socket, frames = [encode([kind, this.#epoch, ...fields]), ...body]
    this.#sent = this.#sent.then(() => socket.send(frames)).catch(() => {}) // one at a time; fails once it is closed
  }

  async #connect() {
    const { endpoints, server_key, public_key, secret_key, token } = this.#profile
    const socket = (this.#socket = new Dealer({
      curveServerKey: server_key, curvePublicKey: public_key, curveSecretKey: secret_key,
      routingId: randomBytes(16), reconnectInterval: -1, linger: 0, sendHighWaterMark: 0,
    }))
    for (const event of ["disconnect", "close"]) socket.events.on(event, () => socket === this.#socket && this.#lose())
    socket.connect(endpoints[this.#skipped % endpoints.length]) // where nobody listens, "close" is all that comes
    this.#send(["HELLO", "MCPB", [1], token, this.#session, [], "node/1", this.#count])
    this.#heard = now()
    for await (const [envelope, body] of socket) if (socket === this.#socket) this.#take(decode(envelope), body)
  }

  #lose() {
    this.#socket?.close()
    if (!this.#open) this.#skipped++ // the next endpoint; one that has answered is tried again
    ;[this.#socket, this.#open, this.#epoch] = [undefined, false, 0]
    this.#retryAt = now() + Math.min(BACKOFF_MAX_MS, BACKOFF_MS * 2 ** this.#failed++) * (0.5 + Math.random() / 2)
  }

  #tick(at) {
    for (const call of this.#calls.values())
      if (call.sent && at >= call.deadline + GRACE_MS) this.#end(call, failure("DEADLINE_EXCEEDED", "no outcome came"))
      else if (!call.sent && at >= call.deadline) this.#end(call, failure("BROKER_LOST", "no broker took it", true))
    const patience = !this.#open ? HELLO_MS : this.#calls.size > this.#unsent.size ? SILENCE_MS : Infinity
    if (this.#socket && at - this.#heard >= patience) this.#lose()
    else if (!this.#socket && !this.#closed && at >= this.#retryAt) this.#connect()
  }

  #take([kind, epoch, ...fields], body) {
    if (this.#open ? epoch !== this.#epoch : !["WELCOME", "ERROR", "GOODBYE"].includes(kind)) return // "Identifiers"
    this.#heard = now()
    if (kind === "WELCOME" && !this.#open) this.#welcome(epoch, fields)
    else if (kind === "OUTCOMES") this.#outcomes(fields, body)
    else if (kind === "PARTIAL") for (const part of fields[0]) this.#part(part, body)
    else if (kind === "HEARTBEAT") this.#send(["ACK", (this.#acked = this.#count)])
    else if (kind === "GOODBYE") {
      for (const call of this.#calls.values()) if (call.sent) this.#end(call, failure("BROKER_LOST", fields[0]))
      ;[this.#session, this.#count] = [null, 0]
      this.#lose()
    } else if (kind === "ERROR" && !this.#open && FINAL.includes(fields[0]))
      this.close(failure(fields[0], fields[1], false, decode(fields[2]))) // the next HELLO would be refused as well
    else if (kind === "ERROR" && fields[3]) this.#lose() // fatal
  }

  #welcome(epoch, [, session, resumed, , granted, , lineage]) {
    const follows = resumed || (lineage && lineage === this.#lineage && epoch !== this.#last) // else it gave us up
    ;[this.#open, this.#epoch, this.#session, this.#lineage, this.#failed] = [true, epoch, session, lineage, 0]
    ;[this.#granted, this.#last] = [{ stream_window: 16, ...granted }, epoch]
    this.#acked = this.#count = resumed ? this.#count : 0
    for (const call of this.#calls.values())
      if (call.sent && (!follows || (!resumed && (call.streamed || call.next)))) // a stream does not outlive its broker
        this.#end(call, failure("BROKER_LOST", "the broker that had the call is gone; nobody knows whether it ran"))
      else if (call.taken) this.#send(["CREDIT", [[call.id, call.taken + this.#granted.stream_window]]])
    this.#unsent = new Set(this.#calls.values()) // all others again, in order of submission
    this.#flush()
  }

  #outcomes([first, outcomes], body) {
    for (const [index, [id, code, inline, , fault, parts]] of outcomes.entries()) {
      if (first + index <= this.#count) continue // had it before
      this.#count = first + index
      const call = this.#calls.get(hex(id)), [why, retryable, details] = fault ?? []
      if (!this.#calls.delete(hex(id))) continue // we ended it ourselves
      if (code !== "OK") this.#end(call, failure(code, why, retryable, details && decode(details)))
      else if (parts > call.next) this.#end(call, failure("BROKER_LOST", "the last parts of the stream were lost"))
      else this.#end(call, undefined, decode(inline ?? body))
    }
    if (body || this.#count - this.#acked >= ACK_EVERY) this.#send(["ACK", (this.#acked = this.#count)])
    this.#flush()
  }

  #part([id, index, inline], body) {
    const call = this.#calls.get(hex(id))
    if (!call || index < call.next) return // ended, or had before
    if (index > call.next++) return this.#end(call, failure("BROKER_LOST", "parts of the stream were lost on the way"))
    call.parts.push(decode(inline ?? body))
    call.wake?.()
  }

  #end(call, error, result) {
    if (call.ended) return
    if (this.#calls.delete(hex(call.id)) && call.sent) this.#send(["CANCEL", [call.id]]) // the broker did not end it
    this.#unsent.delete(call)
    Object.assign(call, { ended: true, error, result })
    call.wake?.()
  }
}

/** Check the golden vectors; names those that JavaScript, having no 5.0 and no 2^53, writes in other bytes. */
function checkVectors(folder) {
  const bytes = (text) => new Uint8Array(Buffer.from(text.replace(/\s/g, ""), "hex"))
  const index = JSON.parse(readFileSync(`${folder}/index.json`), (_, v) => (v?.hex == null ? v : bytes(v.hex)))
  return index.filter(({ name, value }) => {
    const golden = bytes(readFileSync(`${folder}/${name}.hex`, "utf8")), ours = encode(value)
    for (const frame of [golden, ours]) deepStrictEqual(decode(frame), value, name)
    return hex(golden) !== hex(ours)
  }).map(({ name }) => name)
}

if (import.meta.main) {
  const [what, name, args = "{}"] = process.argv.slice(2), client = what !== "vectors" && new Client(readProfile(what))
  console.log(client ? await client.call(name, JSON.parse(args)) : checkVectors(name))
  if (client) await client.close()
}
