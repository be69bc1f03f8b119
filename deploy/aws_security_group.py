"""Create the security group of cluster.yaml: ssh from one network, all traffic between members.

Reads AWS credentials from the environment, creates the group and prints its id.

Run:   python deploy/aws_security_group.py us-west-2 203.0.113.7/32

The group that Ray would create allows ssh from anywhere.
"""

import argparse
from ipaddress import ip_network


def make_group(region: str, ssh_from: str, vpc: str | None = None) -> str:
    """Return the id of a new security group.

    Args:
        region: Region of the cluster.
        ssh_from: Network in CIDR notation, such as 203.0.113.7/32.
        vpc: VPC id; None selects the default VPC of the region.

    Raises:
        ValueError: If `ssh_from` is not a network, or is the whole internet.
    """
    import boto3

    if ip_network(ssh_from).prefixlen == 0:
        raise ValueError(
            f"ssh_from={ssh_from} allows everyone; give your own network, such as 203.0.113.7/32"
        )
    ec2 = boto3.client("ec2", region_name=region)
    if vpc is None:
        default = [{"Name": "is-default", "Values": ["true"]}]
        vpc = ec2.describe_vpcs(Filters=default)["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(
        GroupName="multimodal-ray", Description="Ray cluster: ssh from one network", VpcId=vpc
    )["GroupId"]
    address = "CidrIpv6" if ip_network(ssh_from).version == 6 else "CidrIp"
    ranges = "Ipv6Ranges" if address == "CidrIpv6" else "IpRanges"
    ec2.authorize_security_group_ingress(
        GroupId=group,
        IpPermissions=[
            {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, ranges: [{address: ssh_from}]},
            # Ray's processes choose their ports; -1 means every protocol and port.
            {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]},
        ],
    )
    return group


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Create the security group of cluster.yaml.")
    parser.add_argument("region")
    parser.add_argument("ssh_from", help="network with ssh access, such as 203.0.113.7/32")
    parser.add_argument("--vpc", help="VPC id (default: the default VPC of the region)")
    options = parser.parse_args()
    try:
        print(make_group(options.region, options.ssh_from, options.vpc))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
