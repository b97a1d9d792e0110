// Audio with redundancy (RED, RFC 2198) between throng and a browser, in both directions, through a LiveKit server and
// through throng's embedded SFU. A browser is the judge of what throng sends: it decodes it, or it does not.
//
//   npm ci && THRONG=.../throng THRONG_LIVEKIT_SERVER=.../livekit-server CHROMIUM=.../chromium node red.mjs
//
// Everything stays on loopback. Exit code 0: all holds; 1: something does not, or could not be seen.

import { spawn } from 'node:child_process';
import { createHmac, randomBytes } from 'node:crypto';
import { createSocket } from 'node:dgram';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { createServer as createTcpServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import puppeteer from 'puppeteer-core';

const THRONG = process.env.THRONG ?? 'throng';
const LIVEKIT = process.env.THRONG_LIVEKIT_SERVER ?? 'livekit-server';
const CHROMIUM = onPath(process.env.CHROMIUM ?? process.env.THRONG_CHROMIUM ?? 'chromium');

/** Puppeteer wants a path where a shell takes a name. */
function onPath(program) {
  const folders = program.includes('/') ? [] : (process.env.PATH ?? '').split(':');
  return folders.map((folder) => join(folder, program)).find(existsSync) ?? program;
}

const KEY = 'devkey';
const SECRET = randomBytes(20).toString('hex');
const DEADLINE_MS = 80_000;
/** What a tab listens before it counts: joining, and the jitter buffer's first adjustments, are no subject here. */
const SETTLE_MS = 1_500;
const MEASURE_MS = 5_000;
/** Of throng's run: the tabs join, listen and leave within it. */
const HOLD = '11s';
const PACKETS_PER_SECOND = 50;
/** Busy hosts conceal a little; a payload that is not understood is concealed whole. */
const CONCEALED_MAX = 0.1;
/** Packets that the publisher sends before the server has bound the subscription. */
const BEFORE_SUBSCRIPTION_MAX = 50;
/** LiveKit ends a track with this many frames of silence of its own. */
const SILENCE_AT_END = 11;

const children = new Set();
const folder = mkdtempSync(join(tmpdir(), 'throng-red-'));
const faults = [];
const rows = [];

function check(holds, what) {
  if (!holds) faults.push(what);
}

// ---- Servers and programs ----

function start(program, args, env = {}) {
  const child = spawn(program, args, {
    env: { ...process.env, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  children.add(child);
  child.output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (bytes) => (child.output = (child.output + bytes).slice(-20_000)));
  }
  child.ended = new Promise((resolve) => {
    child.on('error', (error) => {
      child.output += `${program}: ${error.message}`;
      resolve(null);
    });
    child.on('exit', resolve);
  }).finally(() => children.delete(child));
  return child;
}

async function stop(child) {
  child.kill('SIGTERM');
  const gone = await Promise.race([child.ended.then(() => true), sleep(3_000, false)]);
  if (!gone) child.kill('SIGKILL');
}

async function freeTcpPort() {
  const server = createTcpServer();
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address();
  await new Promise((resolve) => server.close(resolve));
  return port;
}

async function freeUdpPort() {
  const socket = createSocket('udp4');
  await new Promise((resolve) => socket.bind(0, '127.0.0.1', resolve));
  const { port } = socket.address();
  await new Promise((resolve) => socket.close(resolve));
  return port;
}

async function untilAnswers(server, child) {
  for (let tries = 0; tries < 100; tries++) {
    if (child.exitCode !== null) break;
    try {
      await fetch(server.metrics);
      return;
    } catch {
      await sleep(100);
    }
  }
  throw new Error(`${server.name} does not answer\n${child.output}`);
}

async function startLiveKit() {
  const [port, tcp, metrics] = [await freeTcpPort(), await freeTcpPort(), await freeTcpPort()];
  const config = {
    port,
    bind_addresses: ['127.0.0.1'],
    keys: { [KEY]: SECRET },
    rtc: {
      node_ip: '127.0.0.1',
      enable_loopback_candidate: true,
      interfaces: { includes: ['lo'] },
      tcp_port: tcp,
      udp_port: await freeUdpPort(),
    },
    prometheus: { port: metrics },
    logging: { level: 'warn' },
  };
  const file = join(folder, 'livekit.yaml');
  // JSON is YAML, too.
  writeFileSync(file, JSON.stringify(config));
  const child = start(LIVEKIT, ['--config', file]);
  const server = {
    name: 'LiveKit',
    url: `ws://127.0.0.1:${port}`,
    metrics: `http://127.0.0.1:${metrics}/metrics`,
    child,
  };
  await untilAnswers(server, child);
  return server;
}

async function startSfu() {
  const port = await freeTcpPort();
  const child = start(THRONG, ['sfu', '--listen', `127.0.0.1:${port}`], {
    LIVEKIT_API_KEY: KEY,
    LIVEKIT_API_SECRET: SECRET,
  });
  const server = {
    name: 'throng sfu',
    url: `ws://127.0.0.1:${port}`,
    metrics: `http://127.0.0.1:${port}/metrics`,
    countsMediaAlone: true,
    child,
  };
  await untilAnswers(server, child);
  return server;
}

/** Packets that the server has received. Both servers name the figure alike, but LiveKit's holds more than media. */
async function packetsIn(server) {
  const text = await (await fetch(server.metrics)).text();
  let sum = 0;
  for (const line of text.split('\n')) {
    if (line.startsWith('livekit_packet_total{') && line.includes('direction="incoming"') && line.includes('transmission="initial"')) {
      sum += Number(line.slice(line.lastIndexOf(' ')));
    }
  }
  return sum;
}

function startThrong(server, room, args) {
  const json = join(folder, `${room}.json`);
  const child = start(
    THRONG,
    ['--url', server.url, '--room', room, '--video-publishers', '0', '--subscribers', '1', '--duration', HOLD, '--no-live', '--json', json, ...args],
    { LIVEKIT_API_KEY: KEY, LIVEKIT_API_SECRET: SECRET },
  );
  child.report = async () => {
    const code = await child.ended;
    // 98: this host was too busy for a load generator, which is not the question here.
    if (code !== 0 && code !== 98) throw new Error(`throng ended with ${code}\n${child.output}`);
    return JSON.parse(readFileSync(json));
  };
  return child;
}

function total(report, part, counter) {
  return report.steps.reduce((sum, step) => sum + (step[part][counter] ?? 0), 0);
}

// ---- The browser ----

function token(identity, room) {
  const encode = (value) => Buffer.from(JSON.stringify(value)).toString('base64url');
  const now = Math.floor(Date.now() / 1000);
  const claims = {
    iss: KEY,
    sub: identity,
    nbf: now - 10,
    exp: now + 600,
    video: { roomJoin: true, room, canPublish: true, canSubscribe: true },
  };
  const signed = `${encode({ alg: 'HS256', typ: 'JWT' })}.${encode(claims)}`;
  return `${signed}.${createHmac('sha256', SECRET).update(signed).digest('base64url')}`;
}

/** Runs in every tab before its scripts. */
function tabScript() {
  const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

  async function within(ms, what, promise) {
    const late = wait(ms).then(() => Promise.reject(new Error(`${what}: not within ${ms} ms`)));
    return Promise.race([promise, late]);
  }

  // getStats() names the codec inside of RED, and nothing counts its blocks. So the payloads are looked at on their way
  // between network and codec, and go on as they are.
  function watcher() {
    const seen = { red: 0, redundant: 0, payloadTypes: {} };
    onrtctransform = ({ transformer }) => {
      const look = new TransformStream({
        transform(frame, controller) {
          const { payloadType, mimeType } = frame.getMetadata();
          const name = `${mimeType ?? '?'} ${payloadType}`;
          seen.payloadTypes[name] = (seen.payloadTypes[name] ?? 0) + 1;
          if (mimeType?.toLowerCase() === 'audio/red') {
            const payload = new Uint8Array(frame.data);
            let [at, older] = [0, 0];
            // F bit, payload type, 14 bits of timestamp offset, 10 bits of length; without the F bit: the primary.
            for (; payload[at] & 0x80; at += 4) older += ((payload[at + 2] & 3) << 8) | payload[at + 3];
            if (at + 1 + older > payload.length) throw new Error('RED is cut short');
            seen.red += 1;
            if (older > 0) seen.redundant += 1;
          }
          controller.enqueue(frame);
        },
      });
      transformer.readable.pipeThrough(look).pipeTo(transformer.writable);
    };
    onmessage = () => postMessage(seen);
  }

  /** `source` sends or receives. */
  function watch(source) {
    if (source.seen) return;
    const worker = new Worker(URL.createObjectURL(new Blob([`(${watcher})()`])));
    source.transform = new RTCRtpScriptTransform(worker);
    source.seen = () =>
      new Promise((resolve) => {
        worker.onmessage = ({ data }) => resolve(data);
        worker.postMessage(null);
      });
  }

  let refusesRed = false;

  window.refuseRed = () => (refusesRed = true);

  window.RTCPeerConnection = class extends RTCPeerConnection {
    constructor(...args) {
      super(...args);
      // At once: Chromium ignores a transform that comes when a stream has begun.
      this.addEventListener('track', ({ receiver }) => {
        if (receiver.track.kind === 'audio') watch(receiver);
      });
    }

    addTransceiver(track, ...rest) {
      const transceiver = super.addTransceiver(track, ...rest);
      if (track.kind === 'audio') watch(transceiver.sender);
      if (track === 'audio') watch(transceiver.receiver);
      return transceiver;
    }

    createOffer(...args) {
      this.#chooseCodecs();
      return super.createOffer(...args);
    }

    createAnswer(...args) {
      this.#chooseCodecs();
      return super.createAnswer(...args);
    }

    /** A browser that knows no RED leaves it out of every description of its own. */
    #chooseCodecs() {
      if (!refusesRed) return;
      const { codecs } = RTCRtpReceiver.getCapabilities('audio');
      const others = codecs.filter((codec) => codec.mimeType.toLowerCase() !== 'audio/red');
      this.getTransceivers()
        .filter((transceiver) => transceiver.receiver.track.kind === 'audio')
        .forEach((transceiver) => transceiver.setCodecPreferences(others));
    }
  };

  /** What the browser says of one audio stream, and what was seen of its payloads. */
  async function streamStats(source, type) {
    const stats = [...(await source.getStats()).values()];
    const stream = stats.find((entry) => entry.type === type && entry.kind === 'audio');
    if (!stream) return null;
    const remote = stats.find((entry) => entry.type === 'remote-inbound-rtp');
    return {
      ...(await source.seen()),
      packets: stream.packetsReceived ?? stream.packetsSent,
      bytes: stream.bytesReceived ?? stream.bytesSent,
      lost: stream.packetsLost ?? remote?.packetsLost ?? null,
      samples: stream.totalSamplesReceived ?? 0,
      concealed: stream.concealedSamples ?? 0,
      energy: stream.totalAudioEnergy ?? 0,
    };
  }

  let room;

  window.join = async (url, token) => {
    LivekitClient.setLogLevel('warn');
    room = new LivekitClient.Room();
    // Before connecting: tracks that are there already come at once.
    room.heard = new Promise((resolve) => {
      room.on(LivekitClient.RoomEvent.TrackSubscribed, (track) => {
        if (track.kind !== 'audio') return;
        document.body.appendChild(track.attach());
        resolve(track);
      });
    });
    await within(10_000, 'joining', room.connect(url, token));
  };

  window.listen = async (settle, measure) => {
    const track = await within(10_000, 'a track', room.heard);
    await wait(settle);
    const before = await streamStats(track.receiver, 'inbound-rtp');
    await wait(measure);
    const after = await streamStats(track.receiver, 'inbound-rtp');
    if (!before || !after) throw new Error('the track has no statistics: no packet came');
    const since = (name) => after[name] - before[name];
    return {
      payloadTypes: after.payloadTypes,
      red: since('red'),
      packets: since('packets'),
      bytes: since('bytes'),
      lost: since('lost'),
      redundant: since('redundant'),
      concealed: since('concealed') / since('samples'),
      energy: since('energy'),
    };
  };

  window.untilSomebodyIsThere = async (prefix) => {
    for (let tries = 0; tries < 100; tries++) {
      if ([...room.remoteParticipants.values()].some(({ identity }) => identity.startsWith(prefix))) return;
      await wait(100);
    }
    throw new Error(`nobody called ${prefix} came`);
  };

  window.publish = async () => {
    await room.localParticipant.setMicrophoneEnabled(true, undefined, { red: true, dtx: false });
  };

  /** Stops sending before it counts, so that the count is the last word. */
  window.endPublishing = async () => {
    const [publication] = room.localParticipant.trackPublications.values();
    const { sender } = publication.track;
    const parameters = sender.getParameters();
    parameters.encodings.forEach((encoding) => (encoding.active = false));
    await sender.setParameters(parameters);
    await wait(500);
    return streamStats(sender, 'outbound-rtp');
  };

  window.leave = () => room?.disconnect();

  window.decodeFile = async (base64) => {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const audio = await new OfflineAudioContext(1, 1, 48_000).decodeAudioData(bytes.buffer);
    const samples = audio.getChannelData(0);
    const energy = samples.reduce((sum, sample) => sum + sample * sample, 0) / audio.sampleRate;
    return { seconds: audio.duration, energy };
  };
}

const browserLog = [];
let page;
let browser;

async function startBrowser() {
  const client = readFileSync(new URL('node_modules/livekit-client/dist/livekit-client.umd.js', import.meta.url));
  page = createServer((request, response) => {
    const isScript = request.url === '/livekit-client.js';
    response.setHeader('content-type', isScript ? 'text/javascript' : 'text/html');
    response.end(isScript ? client : '<!doctype html><body><script src="/livekit-client.js"></script>');
  });
  await new Promise((resolve) => page.listen(0, '127.0.0.1', resolve));
  browser = await puppeteer.launch({
    executablePath: CHROMIUM,
    headless: true,
    args: [
      // As root, as in containers, there is no sandbox to be had.
      ...(process.getuid?.() === 0 ? ['--no-sandbox'] : []),
      '--use-fake-device-for-media-stream',
      '--use-fake-ui-for-media-stream',
      '--autoplay-policy=no-user-gesture-required',
      '--mute-audio',
      '--disable-gpu',
      // The servers are on loopback, and names are nobody's.
      '--allow-loopback-in-peer-connection',
      '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
      // Tabs in the background are to listen as those in front do.
      '--disable-background-timer-throttling',
      '--disable-renderer-backgrounding',
      '--disable-backgrounding-occluded-windows',
    ],
  });
}

async function openTab() {
  const tab = await browser.newPage();
  for (const event of ['console', 'pageerror']) {
    tab.on(event, (entry) => browserLog.push(entry.text?.() ?? String(entry)));
  }
  await tab.evaluateOnNewDocument(tabScript);
  await tab.goto(`http://127.0.0.1:${page.address().port}/`);
  return tab;
}

async function openListeners() {
  const [red, plain] = [await openTab(), await openTab()];
  await plain.evaluate(() => refuseRed());
  return [
    { tab: red, identity: 'listener-red', isRed: true },
    { tab: plain, identity: 'listener-opus', isRed: false },
  ];
}

function joinTab(tab, server, identity, room) {
  return tab.evaluate((url, token) => join(url, token), server.url, token(identity, room));
}

function listen({ tab }) {
  return tab.evaluate((settle, measure) => listen(settle, measure), SETTLE_MS, MEASURE_MS);
}

async function closeTabs(tabs) {
  await Promise.all(
    tabs.map(async (tab) => {
      await tab.evaluate(() => leave());
      await tab.close();
    }),
  );
}

// ---- What is to hold ----

function payloads({ payloadTypes }) {
  return Object.keys(payloadTypes).join(', ');
}

/** Both listeners decode; one gets the redundancy, the other the same packets without it. */
function checkListeners(server, from, listeners, heard) {
  heard.forEach((stats, at) => {
    const { isRed } = listeners[at];
    const who = `${server.name}, ${from} to Chromium ${isRed ? 'with' : 'without'} RED`;
    const planned = (PACKETS_PER_SECOND * MEASURE_MS) / 1000;
    rows.push({
      server: server.name,
      path: `${from} -> Chromium${isRed ? '' : ' (no RED)'}`,
      payloads: payloads(stats),
      RED: stats.red,
      packets: stats.packets,
      'B/packet': Math.round(stats.bytes / stats.packets),
      redundant: stats.redundant,
      lost: stats.lost,
      'concealed %': (100 * stats.concealed).toFixed(2),
      energy: stats.energy.toExponential(1),
    });
    check(Math.abs(stats.packets - planned) <= planned / 5, `${who}: ${stats.packets} packets of ${planned}`);
    check(stats.concealed <= CONCEALED_MAX, `${who}: ${stats.concealed} of the samples concealed`);
    check(stats.energy > 0, `${who}: nothing to be heard`);
    check(stats.lost === 0, `${who}: ${stats.lost} packets lost`);
    const repeating = stats.redundant / stats.packets;
    check(isRed ? repeating > 0.9 : stats.red === 0, `${who}: ${stats.red} packets are RED, ${stats.redundant} repeat another`);
  });
  const [red, plain] = heard.map((stats) => stats.bytes / stats.packets);
  check(red > 1.5 * plain, `${server.name}, ${from}: ${red} bytes a packet with RED, ${plain} without`);
}

async function throngToBrowser(server) {
  const room = `to-browser-${server.name.split(' ')[0]}`;
  const listeners = await openListeners();
  const throng = startThrong(server, room, ['--publishers', '1', '--audio-red']);
  const inBrowser = async () => {
    await Promise.all(listeners.map(({ tab, identity }) => joinTab(tab, server, identity, room)));
    const heard = await Promise.all(listeners.map(listen));
    await closeTabs(listeners.map(({ tab }) => tab));
    return heard;
  };
  const [report, heard] = await Promise.all([throng.report(), inBrowser()]);
  checkListeners(server, 'throng', listeners, heard);
  const rejected = total(report, 'session', 'packets_rejected');
  check(rejected === 0, `${server.name}: throng rejected ${rejected} packets beside the browser`);
}

async function browserToThrong(server) {
  const room = `from-browser-${server.name.split(' ')[0]}`;
  const before = await packetsIn(server);
  const record = join(folder, room);
  mkdirSync(record);
  const speaker = await openTab();
  const listeners = await openListeners();
  const throng = startThrong(server, room, ['--publishers', '0', '--record', record]);
  const inBrowser = async () => {
    await joinTab(speaker, server, 'speaker', room);
    await Promise.all(listeners.map(({ tab, identity }) => joinTab(tab, server, identity, room)));
    // Whoever is there first loses nothing but what is sent before the server has bound its subscription.
    await speaker.evaluate(() => untilSomebodyIsThere('throng-'));
    await speaker.evaluate(() => publish());
    const heard = await Promise.all(listeners.map(listen));
    const sent = await speaker.evaluate(() => endPublishing());
    await closeTabs([speaker, ...listeners.map(({ tab }) => tab)]);
    return [heard, sent];
  };
  const [report, [heard, sent]] = await Promise.all([throng.report(), inBrowser()]);
  checkListeners(server, 'Chromium', listeners, heard);
  // Not earlier: LiveKit brings its figure up to date every few seconds.
  const incoming = (await packetsIn(server)) - before;
  const audio = (counter) => total(report, 'audio', counter);
  const [received, red, lost] = ['packets_received', 'packets_received_red', 'packets_lost'].map(audio);
  const rejected = total(report, 'session', 'packets_rejected');
  const files = readdirSync(record, { recursive: true }).filter((file) => file.endsWith('.ogg'));
  const judge = await openTab();
  const decoded = { seconds: 0, energy: 0 };
  for (const file of files) {
    const base64 = readFileSync(join(record, file)).toString('base64');
    const { seconds, energy } = await judge.evaluate((base64) => decodeFile(base64), base64);
    decoded.seconds += seconds;
    decoded.energy += energy;
  }
  await judge.close();

  rows.push(
    {
      server: server.name,
      path: 'Chromium sends (whole run)',
      payloads: payloads(sent),
      RED: sent.red,
      redundant: sent.redundant,
      packets: sent.packets,
      'B/packet': Math.round(sent.bytes / sent.packets),
      lost: sent.lost,
      note: `server counts ${incoming} in`,
    },
    {
      server: server.name,
      path: 'Chromium -> throng (whole run)',
      packets: received,
      'B/packet': Math.round(audio('bytes_received') / received),
      RED: red,
      lost,
      energy: decoded.energy.toExponential(1),
      note: `${rejected} rejected, ${decoded.seconds.toFixed(2)} s decoded of its recording`,
    },
  );
  const who = `${server.name}, Chromium to throng`;
  check(sent.redundant > 0.9 * sent.packets, `${who}: Chromium repeats an earlier packet in ${sent.redundant} of ${sent.packets}`);
  check(rejected === 0, `${who}: ${rejected} packets rejected`);
  check(lost === 0, `${who}: ${lost} packets lost`);
  check(
    received >= sent.packets - BEFORE_SUBSCRIPTION_MAX && received <= sent.packets + SILENCE_AT_END,
    `${who}: ${received} packets of ${sent.packets}`,
  );
  check(received - red <= SILENCE_AT_END, `${who}: ${red} packets of ${received} are RED`);
  if (server.countsMediaAlone) {
    check(incoming === sent.packets, `${who}: the server counts ${incoming} packets of ${sent.packets}`);
  }
  check(sent.lost === 0, `${who}: the server reports ${sent.lost} packets lost`);
  check(files.length === 1, `${who}: ${files.length} files recorded`);
  const seconds = received / PACKETS_PER_SECOND;
  // Longer by the pause between the last packet of the browser and LiveKit's silence.
  check(decoded.seconds > seconds - 0.5 && decoded.seconds < seconds + 3, `${who}: ${decoded.seconds} s can be decoded of ${seconds} s recorded`);
  check(decoded.energy > 0, `${who}: nothing to be heard in the recording`);
}

// ---- The run ----

async function run() {
  await startBrowser();
  for (const startServer of [startLiveKit, startSfu]) {
    const server = await startServer();
    for (const direction of [browserToThrong, throngToBrowser]) {
      try {
        await direction(server);
      } catch (error) {
        faults.push(`${server.name}, ${direction.name}: ${error.message}`);
        await Promise.all((await browser.pages()).slice(1).map((tab) => tab.close()));
      }
    }
    await stop(server.child);
  }
}

async function finish() {
  await Promise.race([browser?.close(), sleep(5_000)]);
  browser?.process()?.kill('SIGKILL');
  page?.close();
  await Promise.all([...children].map(stop));
  rmSync(folder, { recursive: true, force: true });
}

function print() {
  const columns = ['server', 'path', 'payloads', 'packets', 'B/packet', 'RED', 'redundant', 'lost', 'concealed %', 'energy', 'note'];
  const cells = [columns, ...rows.map((row) => columns.map((column) => String(row[column] ?? '')))];
  const widths = columns.map((_, at) => Math.max(...cells.map((row) => row[at].length)));
  for (const row of cells) {
    console.log(row.map((cell, at) => cell.padEnd(widths[at])).join('  ').trimEnd());
  }
  for (const fault of faults) console.log(`FAULT  ${fault}`);
  if (faults.length > 0) for (const line of browserLog.slice(-20)) console.log(`tab    ${line}`);
  console.log(faults.length === 0 ? 'PASS' : 'FAIL');
}

const deadline = AbortSignal.timeout(DEADLINE_MS);
const late = new Promise((_, reject) => {
  deadline.addEventListener('abort', () => reject(new Error(`not done within ${DEADLINE_MS} ms`)));
});
for (const signal of ['SIGINT', 'SIGTERM']) {
  process.once(signal, () => finish().finally(() => process.exit(1)));
}
try {
  await Promise.race([run(), late]);
} catch (error) {
  faults.push(error.message);
}
await finish();
print();
process.exit(faults.length === 0 ? 0 : 1);
