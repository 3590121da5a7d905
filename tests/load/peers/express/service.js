// The same service on Express and Couchbase's Node SDK: what the benchmark compares with.
//
// Written the way their makers recommend: NODE_ENV=production, no synchronous calls, one connection for the life of the
// process, errors through one error handler (Express 5 passes rejected promises on), `x-powered-by` off, stored JSON
// passed through by the SDK's raw transcoder, and Node's cluster module for more than one process. Settings come from
// the service's own environment variables, and SERVICE_PORT, SERVICE_TLS_CERT and SERVICE_TLS_KEY, WORKERS and
// ACCESS_LOG (morgan, `true` or `false`).

import cluster from 'node:cluster'
import { randomUUID, timingSafeEqual } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { createServer, STATUS_CODES } from 'node:http'
import { createServer as createSecureServer } from 'node:https'
import couchbase from 'couchbase'
import express from 'express'
import morgan from 'morgan'

const BACKLOG = 1024
const SANE_REQUEST_ID = /^[A-Za-z0-9._-]{1,64}$/
const [BY_NICKNAME, BY_USERNAME] = ['nickname', 'user_id'].map(
  (field) =>
    `SELECT RAW p FROM \`user_data\` AS p WHERE p.\`${field}\` = $value` +
    ' ORDER BY META(p).id LIMIT $limit OFFSET $offset'
)
const OPENING = Buffer.from('[')
const CLOSING = Buffer.from(']')
const PICTURE_POLICY = "default-src 'none'; sandbox"

class Problem extends Error {
  constructor(status, detail, headers = {}) {
    super(detail)
    this.status = status
    this.headers = headers
  }
}

async function connect() {
  const connection = await couchbase.connect(process.env.COUCHBASE_HOST, {
    username: process.env.COUCHBASE_USER,
    password: process.env.COUCHBASE_PASSWORD,
    transcoder: new couchbase.RawJsonTranscoder(),
    tracingConfig: { enableTracing: false },
    metricsConfig: { enableMetrics: false },
  })
  const scope = connection.bucket(process.env.COUCHBASE_BUCKET).scope(process.env.COUCHBASE_SCOPE ?? 'profiles')
  const token = JSON.parse((await scope.collection('service_auth').get('service_auth:1')).content).token
  return { connection, scope, token }
}

function commonHeaders(request, response, next) {
  const given = request.get('X-Request-ID')
  request.id = given !== undefined && SANE_REQUEST_ID.test(given) ? given : randomUUID()
  response.set('X-Request-ID', request.id)
  response.set('X-Content-Type-Options', 'nosniff')
  next()
}

function requireToken(token) {
  const expected = Buffer.from(token)
  const accepts = (shown) => {
    const given = Buffer.from(shown)
    return given.length === expected.length && timingSafeEqual(given, expected)
  }
  return (request, response, next) => {
    response.set('Cache-Control', 'private, no-cache')
    const given = request.get('Authorization')
    const shown = given === undefined ? request.get('x-access-token') : /^bearer +(.*)$/i.exec(given)?.[1]
    if (shown === undefined || !accepts(shown)) {
      throw new Problem(401, 'a valid bearer token is required', { 'WWW-Authenticate': 'Bearer' })
    }
    next()
  }
}

function wholeNumber(request, name, low, high, otherwise) {
  const text = request.query[name]
  if (text === undefined) return otherwise
  if (!/^[0-9]{1,10}$/.test(text) || Number(text) < low || Number(text) > high) {
    throw new Problem(400, `${name} must be one number from ${low} to ${high}`)
  }
  return Number(text)
}

function routes(scope) {
  const router = express.Router()
  const users = scope.collection('user_data')
  const images = scope.collection('user_images')

  const sendDocument = (response, document) => {
    // `send` answers 304 by itself where If-None-Match names the tag
    response.set('ETag', `"${document.cas}"`)
    response.set('Content-Type', 'application/json')
    response.send(Buffer.concat([OPENING, document.content, CLOSING]))
  }

  const matches = (statement, route) => async (request, response) => {
    const limit = wholeNumber(request, 'limit', 1, 1000, 100)
    const offset = wholeNumber(request, 'offset', 0, 1_000_000_000, 0)
    const { value } = request.params
    const { rows } = await scope.query(statement, {
      adhoc: false,
      readOnly: true,
      parameters: { value, limit: limit + 1, offset },
    })
    if (rows.length === 0) throw new Problem(404, 'no match')
    if (rows.length > limit) {
      const following = `${route}/${encodeURIComponent(value)}?limit=${limit}&offset=${offset + limit}`
      response.set('Link', `<${following}>; rel="next"`)
    }
    response.set('Content-Type', 'application/json')
    response.send(Buffer.from(JSON.stringify(rows.slice(0, limit))))
  }

  router.get('/id/:id', async (request, response) => {
    sendDocument(response, await users.get(`user_data:${request.params.id}`))
  })
  router.get('/nickname/:value', matches(BY_NICKNAME, '/api/v1/nickname'))
  router.get('/username/:value', matches(BY_USERNAME, '/api/v1/username'))
  router.get('/picture/record/:id', async (request, response) => {
    sendDocument(response, await images.get(`user_images:${request.params.id}`))
  })
  router.get('/picture/raw/:id', async (request, response) => {
    const document = await images.get(`user_images:${request.params.id}`)
    const { type, image } = JSON.parse(document.content)
    if (typeof type !== 'string' || typeof image !== 'string' || image === '') {
      throw new Problem(422, 'the picture record has no usable type or base64 image')
    }
    response.set('ETag', `"${document.cas}"`)
    response.set('Content-Type', `image/${type}`)
    response.set('Content-Security-Policy', PICTURE_POLICY)
    response.send(Buffer.from(image, 'base64'))
  })
  return router
}

function problemOf(error) {
  if (error instanceof Problem) return error
  if (error instanceof couchbase.DocumentNotFoundError) return new Problem(404, 'no such document')
  if (error instanceof couchbase.TimeoutError) return new Problem(504, 'Couchbase did not answer in time')
  if (error instanceof couchbase.CouchbaseError) {
    return new Problem(503, 'Couchbase is out of reach', { 'Retry-After': '1' })
  }
  return new Problem(error.status ?? 500, 'unexpected failure')
}

// Express knows an error handler by its four parameters
function sendProblem(error, request, response, _next) {
  const { status, message: detail, headers } = problemOf(error)
  response.status(status).set(headers).set('Cache-Control', 'no-store').set('Content-Type', 'application/problem+json')
  response.send(
    Buffer.from(JSON.stringify({ title: STATUS_CODES[status], status, detail, request_id: request.id }))
  )
}

async function serve() {
  const { connection, scope, token } = await connect()
  const app = express()
  app.disable('x-powered-by')
  app.disable('etag') // documents have one made of their CAS
  if (process.env.ACCESS_LOG === 'true') app.use(morgan('combined'))
  app.use(commonHeaders)
  app.get('/healthz', (_request, response) => response.json({ status: 'alive' }))
  app.use('/api/v1', requireToken(token), routes(scope))
  app.use((_request, _response, next) => next(new Problem(404, 'no such route')))
  app.use(sendProblem)
  const { SERVICE_TLS_CERT: cert, SERVICE_TLS_KEY: key } = process.env
  const server = cert
    ? createSecureServer({ cert: readFileSync(cert), key: readFileSync(key) }, app)
    : createServer(app)
  server.listen({ port: Number(process.env.SERVICE_PORT), host: '127.0.0.1', backlog: BACKLOG })
  process.once('SIGTERM', () => {
    server.close(async () => {
      await connection.close()
      process.exit(0)
    })
    server.closeAllConnections()
  })
}

const workers = Number(process.env.WORKERS ?? 1)
if (cluster.isPrimary && workers > 1) {
  for (let worker = 0; worker < workers; worker += 1) cluster.fork()
  process.once('SIGTERM', () => {
    for (const worker of Object.values(cluster.workers)) worker.kill('SIGTERM')
  })
} else {
  await serve()
}
