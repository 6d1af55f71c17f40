// Drives a server with the published Node packages and prints a JSON line for
// every step: {step, status, result} of an answer, {step, status, error} of a
// refusal, and {step, result} of what takes several calls or none.
//
// Environment: TABARD_URL, TABARD_APIKEY, TABARD_ACCOUNT; and for a compute
// resource's login TABARD_CR_TOKEN_FILE with TABARD_CLUSTER_CRN, the cluster
// whose service account shop/web the token is of.

import core from 'ibm-cloud-sdk-core';
import AccessGroupsV2 from '@ibm-cloud/platform-services/iam-access-groups/v2.js';
import IamIdentityV1 from '@ibm-cloud/platform-services/iam-identity/v1.js';
import IamPolicyManagementV1 from '@ibm-cloud/platform-services/iam-policy-management/v1.js';
import ResourceManagerV2 from '@ibm-cloud/platform-services/resource-manager/v2.js';

const { ContainerAuthenticator, IamAuthenticator, getQueryParam } = core;

const need = (name) => {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set`);
  return value;
};
const url = need('TABARD_URL');
const accountId = need('TABARD_ACCOUNT');
const tokenFile = process.env.TABARD_CR_TOKEN_FILE;
const clusterCRN = tokenFile
  ? need('TABARD_CLUSTER_CRN')
  : `crn:v1:bluemix:public:containers-kubernetes:us-south:a/${accountId}:nowhere::`;

const authenticator = new IamAuthenticator({ apikey: need('TABARD_APIKEY'), url });
const client = (Service, auth = authenticator) =>
  (Service.default ?? Service).newInstance({ authenticator: auth, serviceUrl: url });
const iam = client(IamIdentityV1);
const policies = client(IamPolicyManagementV1);
const groups = client(AccessGroupsV2);
const resources = client(ResourceManagerV2);
const pager = (Service, name) => (Service.default ?? Service)[name];

const print = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
const etag = (response) => response.headers.etag ?? response.headers.get?.('etag');

// A family's steps need one another, so its first surprise ends it; the other
// families still run.
let current = '';
async function family(name, steps) {
  current = name;
  try {
    await steps();
  } catch (e) {
    const where = String(e.stack).split('\n').find((frame) => frame.includes('flows.mjs')) ?? '';
    if (!e.told) print({ step: `${name}: stopped`, error: `${e}${where}` });
    process.exitCode = 1;
  }
}

async function call(step, promise) {
  try {
    const response = await promise;
    print({ step: `${current}: ${step}`, status: response.status, result: response.result });
    return response;
  } catch (e) {
    print({ step: `${current}: ${step}`, status: e.status, error: `${e.message} ${e.body ?? ''}` });
    e.told = true;
    throw e;
  }
}

async function refused(step, promise) {
  try {
    const response = await promise;
    print({ step: `${current}: ${step}`, status: response.status, result: response.result });
  } catch (e) {
    print({ step: `${current}: ${step}`, status: e.status, refusal: e.message });
  }
}

const tell = (step, result) => print({ step: `${current}: ${step}`, result });

// pages follows next links as an application does: it takes the page token out
// of the link and asks again.
async function pages(list, field, params) {
  const seen = [];
  let pagetoken;
  do {
    const { result } = await list({ accountId, pagesize: 2, ...params, ...(pagetoken && { pagetoken }) });
    seen.push(result[field].map((item) => item.name));
    pagetoken = result.next ? getQueryParam(result.next, 'pagetoken') : undefined;
  } while (pagetoken);
  return seen;
}

let profile;
let serviceId;

await family('profile', async () => {
  let answer = await call('create', iam.createProfile({ name: 'node profile', accountId, description: 'first' }));
  profile = answer.result;
  const { id: profileId } = profile;
  answer = await call('get', iam.getProfile({ profileId }));
  const first = etag(answer);
  tell('etag of get is the entity tag', first === answer.result.entity_tag);
  await call('update', iam.updateProfile({ profileId, ifMatch: first, description: 'second' }));
  await refused('update with the old etag', iam.updateProfile({ profileId, ifMatch: first, description: 'third' }));
  await call('update whatever the etag', iam.updateProfile({ profileId, ifMatch: '*', description: 'fourth' }));
  await refused('get another account\'s', iam.getProfile({ profileId: 'Profile-00000000-0000-0000-0000-000000000000' }));

  const others = [];
  for (const name of ['node page 1', 'node page 2', 'node page 3']) {
    others.push((await iam.createProfile({ name, accountId })).result.id);
  }
  tell('pages', await pages((p) => iam.listProfiles(p), 'profiles', { sort: 'name', filter: 'name sw "node "' }));
  await call('list by name', iam.listProfiles({ accountId, name: 'node page 2' }));
  for (const id of others) await iam.deleteProfile({ profileId: id });
});

await family('claim rule', async () => {
  const { id: profileId } = profile;
  const rule = {
    profileId, name: 'jobs', type: 'Profile-CR', crType: 'IKS_SA',
    conditions: [{ claim: 'namespace', operator: 'EQUALS', value: '"batch"' }],
  };
  const { id: ruleId } = (await call('create', iam.createClaimRule(rule))).result;
  const answer = await call('get', iam.getClaimRule({ profileId, ruleId }));
  const ifMatch = etag(answer);
  await call('list', iam.listClaimRules({ profileId }));
  const changed = { ...rule, ruleId, conditions: [{ claim: 'namespace', operator: 'IN', value: '["batch","jobs"]' }] };
  await call('update', iam.updateClaimRule({ ...changed, ifMatch }));
  await refused('update with the old etag', iam.updateClaimRule({ ...changed, ifMatch, name: 'late' }));
  await call('delete', iam.deleteClaimRule({ profileId, ruleId }));
  await refused('get deleted', iam.getClaimRule({ profileId, ruleId }));

  const saml = (await call('create for a directory', iam.createClaimRule({
    profileId, type: 'Profile-SAML', realmName: 'https://idp.example.com/saml', expiration: 3600,
    conditions: [{ claim: 'groups', operator: 'CONTAINS', value: '"admins"' }],
  }))).result;
  await call('delete for a directory', iam.deleteClaimRule({ profileId, ruleId: saml.id }));
});

await family('link', async () => {
  const { id: profileId } = profile;
  const link = { crn: clusterCRN, namespace: 'shop', name: 'web' };
  const { id: linkId } = (await call('create', iam.createLink({ profileId, name: 'web', crType: 'IKS_SA', link }))).result;
  await call('get', iam.getLink({ profileId, linkId }));
  await call('list', iam.listLinks({ profileId }));
  await call('delete', iam.deleteLink({ profileId, linkId }));
  await refused('get deleted', iam.getLink({ profileId, linkId }));
});

await family('service ID', async () => {
  let answer = await call('create', iam.createServiceId({ accountId, name: 'node ci', description: 'first' }));
  serviceId = answer.result;
  const { id } = serviceId;
  answer = await call('get', iam.getServiceId({ id }));
  const ifMatch = etag(answer);
  await call('update', iam.updateServiceId({ id, ifMatch, description: 'second' }));
  await refused('update with the old etag', iam.updateServiceId({ id, ifMatch, description: 'third' }));
  const others = [];
  for (const name of ['node page 1', 'node page 2']) {
    others.push((await iam.createServiceId({ accountId, name })).result.id);
  }
  tell('pages', await pages((p) => iam.listServiceIds(p), 'serviceids', { sort: 'name', filter: 'name sw "node "' }));
  for (const other of others) await iam.deleteServiceId({ id: other });
});

await family('API key', async () => {
  const created = (await call('create', iam.createApiKey({
    name: 'node key', iamId: serviceId.iam_id, description: 'first', expiresAt: '2049-01-02T18:30+0000',
  }))).result;
  const { id } = created;
  const answer = await call('get', iam.getApiKey({ id }));
  const ifMatch = etag(answer);
  await call('by value', iam.getApiKeysDetails({ iamApiKey: created.apikey }));
  await call('update', iam.updateApiKey({ id, ifMatch, description: 'second' }));
  await refused('update with the old etag', iam.updateApiKey({ id, ifMatch, description: 'third' }));
  const login = new IamAuthenticator({ apikey: created.apikey, url });
  const token = await login.tokenManager.getToken();
  tell('login', JSON.parse(Buffer.from(token.split('.')[1], 'base64url')).iam_id === serviceId.iam_id);
  const others = [];
  for (const name of ['node page 1', 'node page 2']) {
    others.push((await iam.createApiKey({ name, iamId: serviceId.iam_id })).result.id);
  }
  tell('pages', await pages((p) => iam.listApiKeys(p), 'apikeys', { iamId: serviceId.iam_id, sort: 'name' }));
  for (const other of others) await iam.deleteApiKey({ id: other });
  await call('lock', iam.lockApiKey({ id }));
  await refused('delete locked', iam.deleteApiKey({ id }));
  await call('unlock', iam.unlockApiKey({ id }));
  await call('delete', iam.deleteApiKey({ id }));
  await refused('login with a deleted key', new IamAuthenticator({ apikey: created.apikey, url }).tokenManager.requestToken());
});

await family('identity', async () => {
  const { id: profileId } = profile;
  const identity = { profileId, identityType: 'serviceid', identifier: serviceId.id, type: 'serviceid' };
  await call('add', iam.setProfileIdentity({ ...identity, description: 'pipeline' }));
  await call('get', iam.getProfileIdentity({ profileId, identityType: 'serviceid', identifierId: serviceId.id }));
  const all = await call('list', iam.getProfileIdentities({ profileId }));
  const ifMatch = etag(all) ?? all.result.entity_tag;
  const crn = `crn:v1:bluemix:public:iam-identity::a/${accountId}::computeresource:node`;
  await call('replace all', iam.setProfileIdentities({
    profileId, ifMatch, identities: [{ identifier: serviceId.id, type: 'serviceid' }, { identifier: crn, type: 'crn' }],
  }));
  await call('get by CRN', iam.getProfileIdentity({ profileId, identityType: 'crn', identifierId: crn }));
  await call('delete by CRN', iam.deleteProfileIdentity({ profileId, identityType: 'crn', identifierId: crn }));
  await call('delete', iam.deleteProfileIdentity({ profileId, identityType: 'serviceid', identifierId: serviceId.id }));
  await refused('get deleted', iam.getProfileIdentity({ profileId, identityType: 'serviceid', identifierId: serviceId.id }));
});

await family('role', async () => {
  const body = { displayName: 'Node auditor', actions: ['iam-groups.groups.read'], description: 'first' };
  const created = await call('create', policies.createRole({ ...body, name: 'NodeAuditor', accountId, serviceName: 'iam-groups' }));
  const { id: roleId, crn } = created.result;
  const ifMatch = etag(await call('get', policies.getRole({ roleId })));
  await call('update', policies.replaceRole({
    ...body, roleId, ifMatch, actions: ['iam-groups.groups.read', 'iam-groups.groups.list'],
  }));
  await refused('update with the old etag', policies.replaceRole({ ...body, roleId, ifMatch }));
  const listed = await call('list', policies.listRoles({ accountId, serviceName: 'iam-groups' }));
  tell('is listed', listed.result.custom_roles.some((r) => r.crn === crn));
  await call('delete', policies.deleteRole({ roleId }));
  await refused('get deleted', policies.getRole({ roleId }));
});

const viewer = 'crn:v1:bluemix:public:iam::::role:Viewer';
const operator = 'crn:v1:bluemix:public:iam::::role:Operator';

await family('policy v1', async () => {
  const body = {
    type: 'access',
    subjects: [{ attributes: [{ name: 'iam_id', value: profile.iam_id }] }],
    roles: [{ role_id: viewer }],
    resources: [{ attributes: [{ name: 'serviceName', value: 'kms' }, { name: 'accountId', value: accountId, operator: 'stringEquals' }] }],
  };
  const { id: policyId } = (await call('create', policies.createPolicy(body))).result;
  await refused('create the same again', policies.createPolicy(body));
  const ifMatch = etag(await call('get', policies.getPolicy({ policyId })));
  await call('update', policies.replacePolicy({ ...body, policyId, ifMatch, roles: [{ role_id: operator }], description: 'second' }));
  await refused('update with the old etag', policies.replacePolicy({ ...body, policyId, ifMatch }));
  await call('list', policies.listPolicies({ accountId, iamId: profile.iam_id }));
  await call('delete', policies.deletePolicy({ policyId }));
  const gone = await call('get deleted', policies.getPolicy({ policyId }));
  await call('revive', policies.updatePolicyState({ policyId, ifMatch: etag(gone), state: 'active' }));
  await call('delete again', policies.deletePolicy({ policyId }));
});

await family('policy v2', async () => {
  const body = (service) => ({
    type: 'access',
    subject: { attributes: [{ key: 'iam_id', operator: 'stringEquals', value: profile.iam_id }] },
    resource: { attributes: [
      { key: 'serviceName', operator: 'stringEquals', value: service },
      { key: 'accountId', operator: 'stringEquals', value: accountId },
    ] },
    control: { grant: { roles: [{ role_id: viewer }] } },
  });
  const hours = {
    pattern: 'time-based-conditions:weekly:custom-hours',
    rule: {
      operator: 'and',
      conditions: [
        { key: '{{environment.attributes.day_of_week}}', operator: 'dayOfWeekAnyOf', value: ['1+00:00', '2+00:00'] },
        { key: '{{environment.attributes.current_time}}', operator: 'timeGreaterThanOrEquals', value: '09:00:00+00:00' },
        { key: '{{environment.attributes.current_time}}', operator: 'timeLessThanOrEquals', value: '17:00:00+00:00' },
      ],
    },
  };
  const { id } = (await call('create', policies.createV2Policy({ ...body('kms'), ...hours }))).result;
  const ifMatch = etag(await call('get', policies.getV2Policy({ id })));
  await call('update', policies.replaceV2Policy({ ...body('kms'), id, ifMatch, description: 'second' }));
  await refused('update with the old etag', policies.replaceV2Policy({ ...body('kms'), id, ifMatch }));
  const others = [];
  for (const service of ['is', 'cloud-object-storage']) {
    others.push((await policies.createV2Policy(body(service))).result.id);
  }
  const V2PoliciesPager = pager(IamPolicyManagementV1, 'V2PoliciesPager');
  const p = new V2PoliciesPager(policies, { accountId, iamId: profile.iam_id, limit: 2 });
  const seen = [];
  while (p.hasNext()) seen.push((await p.getNext()).length);
  tell('pages', seen);
  for (const other of others) await policies.deleteV2Policy({ id: other });
  await call('delete', policies.deleteV2Policy({ id }));
  await refused('delete again', policies.deleteV2Policy({ id }));
});

await family('access group', async () => {
  const { id: accessGroupId } = (await call('create', groups.createAccessGroup({ accountId, name: 'node group', description: 'first' }))).result;
  const ifMatch = etag(await call('get', groups.getAccessGroup({ accessGroupId, showCrn: true })));
  await call('update', groups.updateAccessGroup({ accessGroupId, ifMatch, description: 'second' }));
  await refused('update with the old etag', groups.updateAccessGroup({ accessGroupId, ifMatch, description: 'third' }));

  const members = [{ iam_id: profile.iam_id, type: 'profile' }, { iam_id: serviceId.iam_id, type: 'service' }];
  await call('add members', groups.addMembersToAccessGroup({ accessGroupId, members }));
  await call('is a member', groups.isMemberOfAccessGroup({ accessGroupId, iamId: profile.iam_id }));
  await call('list members', groups.listAccessGroupMembers({ accessGroupId, verbose: true }));
  const MembersPager = pager(AccessGroupsV2, 'AccessGroupMembersPager');
  tell('member pages', (await new MembersPager(groups, { accessGroupId, limit: 1 }).getAll()).length);
  await call('list groups of a member', groups.listAccessGroups({ accountId, iamId: profile.iam_id, hidePublicAccess: true }));

  const rule = {
    accessGroupId, name: 'managers', expiration: 12, realmName: 'https://idp.example.com/saml',
    conditions: [{ claim: 'isManager', operator: 'EQUALS', value: '"true"' }],
  };
  const { id: ruleId } = (await call('create rule', groups.addAccessGroupRule(rule))).result;
  const ruleTag = etag(await call('get rule', groups.getAccessGroupRule({ accessGroupId, ruleId })));
  await call('update rule', groups.replaceAccessGroupRule({ ...rule, ruleId, ifMatch: ruleTag, expiration: 24 }));
  await refused('update rule with the old etag', groups.replaceAccessGroupRule({ ...rule, ruleId, ifMatch: ruleTag }));
  await call('list rules', groups.listAccessGroupRules({ accessGroupId }));

  const others = [];
  for (const name of ['node page 1', 'node page 2']) {
    others.push((await groups.createAccessGroup({ accountId, name })).result.id);
  }
  const GroupsPager = pager(AccessGroupsV2, 'AccessGroupsPager');
  const all = await new GroupsPager(groups, { accountId, limit: 2, hidePublicAccess: true, sort: 'name' }).getAll();
  tell('pages', all.map((g) => g.name).filter((n) => n.startsWith('node ')));
  for (const other of others) await groups.deleteAccessGroup({ accessGroupId: other });

  await refused('delete while it has members', groups.deleteAccessGroup({ accessGroupId }));
  await call('delete rule', groups.removeAccessGroupRule({ accessGroupId, ruleId }));
  await call('remove a member', groups.removeMemberFromAccessGroup({ accessGroupId, iamId: serviceId.iam_id }));
  await call('remove members', groups.removeMembersFromAccessGroup({ accessGroupId, members: [profile.iam_id] }));
  await refused('is no member', groups.isMemberOfAccessGroup({ accessGroupId, iamId: profile.iam_id }));
  await call('delete', groups.deleteAccessGroup({ accessGroupId }));
  await refused('get deleted', groups.getAccessGroup({ accessGroupId }));
});

await family('resource group', async () => {
  const { id } = (await call('create', resources.createResourceGroup({ accountId, name: 'node-group' }))).result;
  await call('get', resources.getResourceGroup({ id }));
  await call('update', resources.updateResourceGroup({ id, name: 'node-group-2' }));
  await call('list by name', resources.listResourceGroups({ accountId, name: 'node-group-2' }));
  await call('list the default', resources.listResourceGroups({ accountId, _default: true }));
  await call('delete', resources.deleteResourceGroup({ id }));
  await refused('create without a right to it', resources.createResourceGroup({ accountId: 'f'.repeat(32), name: 'theirs' }));
});

if (tokenFile) {
  await family('compute resource', async () => {
    const { id: profileId } = profile;
    await call('link', iam.createLink({
      profileId, name: 'web', crType: 'IKS_SA', link: { crn: clusterCRN, namespace: 'shop', name: 'web' },
    }));
    const grant = (service) => policies.createV2Policy({
      type: 'access',
      subject: { attributes: [{ key: 'iam_id', operator: 'stringEquals', value: profile.iam_id }] },
      resource: { attributes: [
        { key: 'serviceName', operator: 'stringEquals', value: service },
        { key: 'accountId', operator: 'stringEquals', value: accountId },
      ] },
      control: { grant: { roles: [{ role_id: viewer }] } },
    });
    await call('policy', grant('iam-identity'));
    for (const [by, selector] of Object.entries({
      'profile name': { iamProfileName: profile.name },
      'profile id': { iamProfileId: profileId },
    })) {
      const pod = client(IamIdentityV1, new ContainerAuthenticator({ crTokenFilename: tokenFile, url, ...selector }));
      await call(`reads its profile, by ${by}`, pod.getProfile({ profileId }));
      await refused(`may not change it, by ${by}`, pod.updateProfile({ profileId, ifMatch: '*', description: 'mine' }));
    }
    const stranger = new ContainerAuthenticator({ crTokenFilename: tokenFile, url, iamProfileName: 'nobody' });
    await refused('may not wear an unknown profile', stranger.tokenManager.requestToken());
  });
}

await family('end', async () => {
  await call('delete service ID', iam.deleteServiceId({ id: serviceId.id }));
  await call('delete profile', iam.deleteProfile({ profileId: profile.id }));
  await refused('get deleted profile', iam.getProfile({ profileId: profile.id }));
  await refused('list policies of a deleted profile', policies.listV2Policies({ accountId, iamId: profile.iam_id }));
});
