/** The report page of `ebb compare`: one self-contained HTML file with plots as SVG, no scripts, no network. */
import * as Plot from '@observablehq/plot';
import { parseHTML } from 'linkedom';
import { formatBytes, GiB, MiB, NS_PER_S } from '@ebb/machine';
import { verdict, type CompareOutcome, type TechniqueRun } from '../compare/compare.ts';

function svg(options: Parameters<typeof Plot.plot>[0]): string {
  const { document } = parseHTML('<html><body></body></html>');
  const figure = Plot.plot({ ...options, document }) as unknown as { outerHTML: string };
  return figure.outerHTML;
}

/** Host memory over virtual time, a line per technique. */
function hostPlot(outcome: CompareOutcome): string {
  const rows = outcome.runs.flatMap((run) =>
    run.result.samples.map((s) => ({
      technique: run.technique,
      seconds: s.atNs / NS_PER_S,
      GiB: s.hostUsed / GiB,
    })),
  );
  return svg({
    width: 920,
    height: 320,
    marginLeft: 48,
    grid: true,
    color: { legend: true, domain: outcome.runs.map((r) => r.technique) },
    x: { label: 'virtual seconds' },
    y: { label: 'host memory in use, GiB', domain: [0, outcome.json.host.memoryBytes / GiB] },
    marks: [
      Plot.ruleY([outcome.json.host.memoryBytes / GiB], { stroke: 'crimson', strokeDasharray: '4 3' }),
      Plot.line(rows, { x: 'seconds', y: 'GiB', stroke: 'technique', strokeWidth: 2 }),
    ],
  });
}

/** Free, ballooned, cached and used per guest over time, for one technique. */
function guestPlot(run: TechniqueRun): string {
  const rows = run.result.samples.flatMap((s) =>
    s.guests.flatMap((guest, vm) =>
      (['used', 'cached', 'balloon', 'free'] as const).map((kind) => ({
        vm: `VM ${vm}`,
        seconds: s.atNs / NS_PER_S,
        kind,
        MiB: guest[kind] / MiB,
      })),
    ),
  );
  return svg({
    width: 920,
    height: 90 + 80 * Math.max(1, run.result.samples.at(-1)?.guests.length ?? 1),
    marginLeft: 48,
    marginRight: 56,
    x: { label: 'virtual seconds' },
    y: { label: 'MiB', ticks: 3, grid: true },
    fy: { label: null },
    color: {
      legend: true,
      domain: ['used', 'cached', 'balloon', 'free'],
      range: ['#4269d0', '#efb118', '#c76fa8', '#b8d8be'],
    },
    marks: [
      Plot.areaY(
        rows,
        Plot.stackY({
          x: 'seconds',
          y: 'MiB',
          fill: 'kind',
          fy: 'vm',
          order: ['used', 'cached', 'balloon', 'free'],
        }),
      ),
    ],
  });
}

const escape = (text: string): string => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;');

/** Renders the page. */
export function renderReport(outcome: CompareOutcome): string {
  const { json, vms } = outcome;
  const fit = ({ vmsFit, vmsFitRange }: (typeof json.results)[number]): string =>
    vms === undefined ? `<b>${vmsFit}</b> (${vmsFitRange.join('–')})` : `<b>${verdict(vmsFitRange)}</b>`;
  const rows = json.results
    .map(
      (r) =>
        `<tr><td>${r.technique}</td><td>${fit(r)}</td><td>${formatBytes(r.hostPeakBytes)}</td>` +
        `<td>${formatBytes(r.returnedBytes)}</td><td>${r.eptViolations}</td><td>${r.tlbFlushes}</td><td>${(r.stallVirtualNs.total / 1e6).toFixed(1)} ms</td><td>${r.ledgerViolations}</td></tr>`,
    )
    .join('\n');
  const guests = outcome.runs
    .map((run) => `<h3>${run.technique}: ${vms ?? run.vmsFit} VMs</h3>${guestPlot(run)}`)
    .join('\n');
  return `<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Ebb: ${escape(json.trace.name)} on ${formatBytes(json.host.memoryBytes)}</title>
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2rem auto;padding:0 1rem;color:#222}table{border-collapse:collapse;width:100%}td,th{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}svg{max-width:100%}</style>
<h1>How many VMs fit?</h1>
<p>Trace <b>${escape(json.trace.name)}</b> (${json.trace.events} events, hash ${json.trace.hash}), guests of ${formatBytes(json.trace.guestMemoryBytes)}, host of ${formatBytes(json.host.memoryBytes)}, seeds ${json.seeds.join(', ')}, schedule ${json.schedule}, huge pages ${json.hugePages}, cost table ${json.costTable}, Ebb ${json.ebb}.</p>
<table><tr><th>technique</th><th>${vms === undefined ? 'VMs that fit' : `${vms} VMs fit`}</th><th>host peak</th><th>returned</th><th>EPT violations</th><th>TLB flushes</th><th>stall</th><th>violations</th></tr>
${rows}</table>
<h2>Host memory over time</h2>
<p>Each line is the median run of its technique: ${vms === undefined ? 'exactly as many VMs as fit' : `${vms} VMs`}. The dashed line is the host.</p>
${hostPlot(outcome)}
<h2>Inside the guests</h2>
<p>Used, cached, ballooned and free memory of each guest over virtual time.</p>
${guests}
</html>
`;
}
